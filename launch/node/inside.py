"""The few lines of shell that run inside a container, whose image may have no Python."""

# Goes in front of the engine. The image's own ENTRYPOINT may be anything, even a shell, and is not
# used; NVIDIA's, which sets up the image's libraries, is called by its path.
ENTRY = r"""
entry=/opt/nvidia/nvidia_entrypoint.sh
if [ -x "$entry" ]; then exec "$entry" "$@"; fi
exec "$@"
"""

# A container ends with its standard input, which is the order's: even if the order and docker's
# client are killed, or the node or its daemon cannot be reached for a while. A `cat` that is killed
# is not the end of the input.
ATTENDED = (
    r"""
exec 3<&0 </dev/null
({ until cat; do sleep 1; done; kill -TERM $$; sleep 5; kill -KILL $$; } <&3 >/dev/null 2>&1 &)
exec 3<&-
"""
    + ENTRY
)

# A container for ranks to run in: it says that it is up, with the node's name, and waits, too.
UP = r"""
printf '{"node": "%s", "Up": {}}\n' "$1"
until cat >/dev/null; do sleep 1; done
"""

# A process that is nobody's child ends a session when its input ends: then its owner is gone.
OUTLIVES = r"""
exec 3<&0 </dev/null
({ while read -r _; do :; done; kill -s KILL -- "-$1"; } <&3 >/dev/null 2>&1 &)
"""

# Every open file of every process, to find the owner of a socket.
OPEN_FILES = "ls -l /proc/[0-9]*/fd"
