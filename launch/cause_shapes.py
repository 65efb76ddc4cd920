"""The shapes in which logs say that something has failed, and what only looks like it."""

import re

from launch.engines import every


def any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


# A dotted name alone may be a configuration key, such as `speculative_config.Eagle`.
EXCEPTION = re.compile(
    r"(?![\w.]*(?:Warning|Deprecated))((?:[A-Za-z_]\w*\.)+(?:[A-Z]\w*(?=:)|gaierror"
    r"|\w*(?:Error|Exception|Interrupt|Exit|Timeout|Group|Empty))|Exception"
    r"|[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout|Group))(?:: |:?\Z)"
)
LINKED = ("The above exception was the direct cause", "During handling of the above exception")
OUTSIDE = any_of(  # the exception that follows has ended no process
    r"Exception (ignored )?in\b(?! worker)",
    r"(Task|Future) exception was never retrieved",
    r"Error in (atexit|sys\.excepthook)",
    r"--- Logging error ---",
)
FRAME = re.compile(r' *File "\S*?([^/"]*/[^/"]+)", line \d')  # with its last folder
REFUSES = re.compile(r"(Value|Assertion|NotImplemented|Runtime)Error: ")  # what checks raise
ENDS_MESSAGE = any_of(
    r"Traceback|Exception |The above exception|During handling|[-=*]{5,}|File \"",
    r"frame #|Process \S+:|\[|/\S+:\d+: |srun:|\S+:\d+:\d+ \[|\d+ +0x",
    r"Fatal|terminate called|[^:|]*: +\d+%|Thread 0x|Extension modules|\S+: line \d+: |Killed",
)
PLAIN = any_of(  # lines that are the cause themselves
    r"Error: (?!ucp_)\S",
    r"(?!srun|slurmstepd|salloc|sbatch|collect2)[\w./-]+(?: [\w-]+)?: error: ",  # argparse
    r"docker: |Error response from daemon: |nvidia-container-cli",
    r"OCI runtime|exec /|.*exec format error",
    r"\S*python\S*: (No module|can't open|Error while finding module)",
    r".*: (error while loading shared libraries|symbol lookup error):",
    r"Assertion failed: |Failed: \w+ error |(CUDA|cu\w+|CUTLASS) [Ee]rror( \(|: )",
    r"DeepEP timeout|LLVM ERROR: |libgomp: |OMP: Error |setting (mem|cpu)bind: ",
    r"(Scheduler w|W)atchdog timeout|\*\*\* (stack smashing|buffer overflow)",  # and glibc's:
    r".*(double free or corruption|corrupted (size|double)|munmap_chunk\(\): \w+ )",
    r".*(free|malloc|realloc)\(\): \w+ ",
    r"(srun|slurmstepd(-\S+)?|salloc): fatal: ",
    r" *Reason: +OOMKilled|.*(killed by the OOM killer|Failed with result 'oom-kill')",
    r"\S+: CUDA_VISIBLE_DEVICES=\S* has too few GPUs",  # our own words, without a container
    r".*(NVRM: (Xid|.*fallen off)|Out of memory: Killed process|[Mm]emory cgroup out of memory)",
)
SHELL = any_of(
    r"\S*sh: ((line )?\d+: )?/\S+: No such file or directory$",
    r"(?!.*\b(enroot-|nvidia-smi:))"  # nvidia-smi is only asked whether there are GPUs
    r".*: (command not found|not found$|cannot execute|version \S+ not found)",
    r"(\S+: ((line )?\d+: )?)?\S+: Permission denied$",
)
FAMILIAR = any_of(  # lines that count if the table knows them
    r".*Caught signal \d|.*\] Signal: |Fatal Python error: |!+ Segfault|\*\*\* SIG\w+ received",
    r"(Segmentation fault|Bus error|Illegal instruction|Aborted|Killed)( \(core dumped\))?$",
    r".*: line \d+: +\d+ (?!Done)[A-Z]|Signal \d+ \(SIG|terminate called without",
    r"Exit code: -\d|.*exit ?code *[:=]? ?-\d|.*unexpectedly failed with ",
    r"(srun|slurmstepd(-\S+)?|salloc): error: |\*\*\* (STEP|JOB) |pyxis: ",
    r".*: engine core exited unexpectedly|srun: unrecognized option ",
    r".*nvshmem\S*:\d+: |Libfabric error: |Failed to initialize NVML",
    r".*UCX +FATAL|(\[\S+:\d+\] )?\*\*\* An error occurred in MPI|Failed, NCCL error",
    r"\[\S+:\d+\].*\b(ERROR|Error):? ",
)
WRAPS = any_of(  # text around the exception of another process
    r"(?<=RuntimeError: )(Dummy run failed: )?Worker failed with error '(?!')",
    r"', please check the stack trace above.*",
)
WARNS = re.compile(r"[Ff]ail|[Ee]rror|[Ee]xception|annot |[Cc]ould not|nable to")
WENT_ON = "a warning"  # what `outside` says of the traceback of one
CLEANING = re.compile(r"object has no attribute")  # from cleaning up what was never made
NCCL_WARNS = re.compile(r".*?(transport/nvls\S+ )?NCCL WARN (.+)")
NCCL_FAILED = re.compile(r"NCCL error|nccl\w*Error|DistBackendError|NCCL operation")
UCX_WARNS = any_of(r".*UCX +ERROR", r"\[\S+:\d+\] pml_ucx")
UCX_FAILED = re.compile(r"(?i)MPI_INIT|PML add|PMPI_|\bucp_|UCX_ERR|ucxx|nixl|reset by remote peer")
BUILD_WARNS = any_of(
    r"(nvcc|ptxas) fatal|Could not load library|\S*ld: cannot find|.*fatal error: \S+\.h:",
    r".*\b(nvcc|cicc|ptxas|gcc|g\+\+|ninja): (command )?not found",
)
BUILD_FAILED = re.compile(r"ninja|nvcc|compil|Inductor|CUDNN|non-zero exit|Abort", re.IGNORECASE)
CUDA_WARNS = re.compile(r"(?:.*UserWarning: )?(CUDA initialization: .+|This container was built.+)")
NO_CUDA = any_of("[Nn]o CUDA(-capable| GPUs)", "Failed to infer device type", "No accelerator ")
WHAT = re.compile(r".*\bwhat\(\):\s+(.+)")
REPORTED = any_of(  # text before the error itself
    r"Failed to initialize executor on rank \d+: (?=\S)",
    r"Error (executing|in event loop|in \w+ loop|in thread)[^:]*: (?=\S)",
    r"(Encountered an error in \w+( function)?|[\w ]*hit an exception): (?=\S)",
    r".*terminated with exception: (?=\S)",
)
DIES = re.compile(
    r"encountered a fatal error|hit an exception|Error in event loop|_event_loop_wrapper"
)
THAT_NOT_WHY = any_of(  # says that something failed, not what
    r"(Error|Exception|Failure) (in|during|while) [\w ./-]+\Z",
    r"[\w ./()-]+ (failed|died|crashed|errored|hit an exception)\.?\Z",
)
NO_ERROR = re.compile(r"^Traceback|^ |ignored\.?\Z")
OF_REQUESTS = re.compile(r"jinja2|RequestValidation|HTTPException|BadRequest|RequestError")
RULE = re.compile(r"-{70,78}\s*\Z")
REMARKS = any_of(
    r"By default, for Open MPI|A process has executed|No OpenFabrics",
    r"Open MPI failed an OFI|PMIx was unable to find a usable compression",
)
STARTS = any_of(*(engine.STARTS for engine in every()))
IN_ORDER = re.compile(r"Finished server process|Application shutdown complete")
KILLS_ITSELF = any_of(  # the server itself, or srun after one of its tasks has failed
    r"Received sigquit from a child|SIGQUIT received|srun: (Force )?[Tt]erminat(ing|ed) StepId",
)
KILLED = any_of(
    r"(\S+: line \d+: +\d+ )?Killed\b|srun: error: \S+: tasks? [\d,-]+: (Killed|Terminated)",
    r"slurmstepd\S*: error: \*\*\* STEP \S+ ON \S+ CANCELLED AT \S+ \*\*\*",
)
READY = re.compile(r"Uvicorn running on|The server is fired up and ready to roll")
ANSWERED = re.compile(r'"POST /\S* HTTP/[\d.]+" 2\d\d')
REFUSED = re.compile(r'"POST /\S* HTTP/[\d.]+" ([45])\d\d')
WORKS = any_of(*(engine.WORK_WORDS.pattern.decode() for engine in every()))
FATAL = re.compile(r"CUDA error: (?!out of memory)|Caught signal|Fatal Python error|uncorrectable")
