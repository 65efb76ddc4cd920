// A stand-in for pyxis, NVIDIA's plug-in of Slurm that runs steps in containers: the options that
// the launcher gives, and what the real one was seen to do with them. It is strict: what is not
// imitated is refused, and what the real one gets wrong by letting a shell run it, too.
//
// The first task of a node unpacks the image as the user and makes a mount namespace, which all
// tasks of that node join; the last one that ends takes both away. Unlike the real one it needs no
// enroot, no user namespace and no seccomp.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <slurm/slurm.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis, 1)
#define PATH_SIZE 4096
#define HOOK "[ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1"

enum { IMAGE, MOUNTS, WORKDIR, ENV, HOME, REMAP, WRITABLE, ENTRYPOINT, OPTIONS };
static char *given[OPTIONS];
static char state[PATH_SIZE], root[PATH_SIZE], wrong[PATH_SIZE];  // state: of one step on a node
static int ended, unpacking_failed;
static uid_t uid;
static gid_t gid;

static int invalid_mounts(const char *text)
{
    char *copy = strdup(text), *rest = copy, *each;
    int bad = strpbrk(text, "\"`") != NULL || strstr(text, "$(") != NULL;
    while ((each = strsep(&rest, ",")))
        bad |= each[0] != '/' && strncmp(each, "./", 2) && strncmp(each, "tmpfs:/", 7);
    free(copy);
    return bad;
}

static int take(int val, const char *optarg, int remote)
{
    int which = val / 2;
    const char *value = optarg ? optarg : val % 2 ? "yes" : "no";
    if (given[which] && strcmp(given[which], value))
        return -1;  // twice, with another value
    if (!*value || (which == MOUNTS && invalid_mounts(value)))
        return -1;
    if (val % 2 && (which == HOME || which == REMAP || which == ENTRYPOINT))
        return -1;  // not imitated
    given[which] = strdup(value);
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "[USER@][REGISTRY#]IMAGE[:TAG]|PATH", "[pyxis] the image", 1, 2 * IMAGE, take},
    {"container-mounts", "SRC:DST[:FLAGS][,SRC:DST...]", "[pyxis] bind mounts", 1, 2 * MOUNTS, take},
    {"container-workdir", "PATH", "[pyxis] working directory", 1, 2 * WORKDIR, take},
    {"container-env", "NAME[,NAME...]", "[pyxis] variables that override the image's", 1, 2 * ENV, take},
    {"container-mount-home", NULL, "[pyxis] bind mount the home directory", 0, 2 * HOME + 1, take},
    {"no-container-mount-home", NULL, "[pyxis] do not", 0, 2 * HOME, take},
    {"container-remap-root", NULL, "[pyxis] be root in the container", 0, 2 * REMAP + 1, take},
    {"no-container-remap-root", NULL, "[pyxis] do not", 0, 2 * REMAP, take},
    {"container-writable", NULL, "[pyxis] root file system writable", 0, 2 * WRITABLE + 1, take},
    {"container-readonly", NULL, "[pyxis] root file system read-only", 0, 2 * WRITABLE, take},
    {"container-entrypoint", NULL, "[pyxis] run the entrypoint", 0, 2 * ENTRYPOINT + 1, take},
    {"no-container-entrypoint", NULL, "[pyxis] do not", 0, 2 * ENTRYPOINT, take},
    SPANK_OPTIONS_TABLE_END};

int slurm_spank_init(spank_t sp, int argc, char *argv[])
{
    if (spank_context() == S_CTX_SLURMD || spank_context() == S_CTX_JOB_SCRIPT)
        return 0;
    for (struct spank_option *each = options; each->name; each++)
        if (spank_option_register(sp, each) != ESPANK_SUCCESS)
            return -1;
    return 0;
}

static void from_environment(spank_t sp, const char *name, int which)
{
    char value[PATH_SIZE];
    if (!given[which] && spank_getenv(sp, name, value, sizeof value) == ESPANK_SUCCESS)
        given[which] = strdup(value);
}

static char *in(const char *folder, const char *name)  // a new string: folder/name
{
    char *path = NULL;
    if (asprintf(&path, "%s/%s", folder, name) < 0)
        abort();
    return path;
}

static void make(const char *path, int is_file)  // with all directories above it
{
    char *copy = strdup(path);
    for (char *slash = copy + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = 0;
        mkdir(copy, 0755);
    }
    if (is_file)
        close(open(copy, O_CREAT | O_WRONLY, 0644));
    else
        mkdir(copy, 0755);
    free(copy);
}

static int is_in_list(const char *list, const char *name)
{
    char *copy = strdup(list ? list : ""), *rest = copy, *each;
    int found = 0;
    while ((each = strsep(&rest, ",")))
        found |= !strcmp(each, name);
    free(copy);
    return found;
}

static int exit_code(pid_t child)
{
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return 1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void unpack(void)  // as the user, with enroot's words, into the log
{
    int log = open(in(state, "log"), O_CREAT | O_WRONLY, 0644), file;
    struct stat found;
    char magic[4] = "";
    dup2(log, 1);
    dup2(log, 2);
    if (setgid(gid) || setuid(uid))
        _exit(1);
    if (given[IMAGE][0] != '/' && strncmp(given[IMAGE], "./", 2)) {
        printf("[ERROR] URL https://registry-1.docker.io/v2/%s returned error code: 401 Unauthorized\n", given[IMAGE]);
    } else if (stat(given[IMAGE], &found) || !S_ISREG(found.st_mode)) {
        printf("[ERROR] No such file or directory: %s\n", given[IMAGE]);
    } else if ((file = open(given[IMAGE], O_RDONLY)) < 0 || read(file, magic, 4) != 4 || memcmp(magic, "hsqs", 4)) {
        printf("[ERROR] Invalid image format: %s\n", given[IMAGE]);
    } else {
        fclose(stdin);
        execlp("unsquashfs", "unsquashfs", "-no-progress", "-no-xattrs", "-user-xattrs", "-dest", root, given[IMAGE], NULL);
        printf("[ERROR] Command not found: unsquashfs\n");
    }
    fflush(stdout);
    _exit(1);
}

static int needs_nvidia(spank_t sp)  // the hook's tool, which is not there
{
    char value[PATH_SIZE] = "", line[PATH_SIZE], *path = strdup(getenv("PATH") ? getenv("PATH") : ""), *folder;
    FILE *file = fopen(in(root, "etc/environment"), "r");
    while (file && fgets(line, sizeof line, file))
        sscanf(line, "NVIDIA_VISIBLE_DEVICES=%4000s", value);
    spank_getenv(sp, "NVIDIA_VISIBLE_DEVICES", value, sizeof value);
    if (!*value || !strcmp(value, "void"))
        return 0;
    while ((folder = strsep(&path, ":")))
        if (!access(in(folder, "nvidia-container-cli"), X_OK))
            return 0;
    return 1;
}

static void bind_to(const char *source, const char *target, unsigned long flags)
{
    struct stat found;
    char *there = in(root, target + 1);
    if (stat(source, &found)) {
        snprintf(wrong, sizeof wrong, "--container-mounts: source path does not exist: %s", source);
        return;
    }
    make(there, !S_ISDIR(found.st_mode));
    if (mount(source, there, NULL, MS_BIND | MS_REC, NULL))
        snprintf(wrong, sizeof wrong, "couldn't mount %s: %s", source, strerror(errno));
    if (flags)
        mount(NULL, there, NULL, MS_REMOUNT | MS_BIND | flags, NULL);
}

static void fresh(const char *target)
{
    char options[100], *there = in(root, target + 1);
    snprintf(options, sizeof options, "mode=755,uid=%d,gid=%d", uid, gid);
    make(there, 0);
    mount("tmpfs", there, "tmpfs", MS_NOSUID | MS_NODEV, options);
}

static void mount_what_was_asked_for(void)
{
    char *rest = given[MOUNTS] ? strdup(given[MOUNTS]) : NULL, *each;
    while (rest && (each = strsep(&rest, ","))) {
        char *source = strsep(&each, ":"), *target = strsep(&each, ":");
        if (!strcmp(source, "tmpfs"))
            fresh(target);
        else
            bind_to(source, target ? target : source, each && strstr(each, "ro") ? MS_RDONLY : 0);
    }
}

static void enter_new_root(const char *home)  // in a mount namespace of our own
{
    const char *of_node[] = {"/proc", "/sys", "/dev", "/etc/hosts", "/etc/resolv.conf", NULL};
    mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
    mount(root, root, NULL, MS_BIND, NULL);
    for (const char **each = of_node; *each; each++)
        bind_to(*each, *each, strncmp(*each, "/etc", 4) ? 0 : MS_RDONLY);
    fresh("/tmp");
    fresh("/run");
    if (*home == '/')
        make(in(root, home + 1), 0);
    mount_what_was_asked_for();
    if (!given[WRITABLE] || strcmp(given[WRITABLE], "yes"))
        mount(NULL, root, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL);
    if (chdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH))
        snprintf(wrong, sizeof wrong, "couldn't change the root: %s", strerror(errno));
}

static int start(spank_t sp)  // of the first task: unpack, and make the namespace
{
    char home[PATH_SIZE] = "";
    FILE *keeper;
    int up[2], code;
    pid_t child = fork();
    if (!child)
        unpack();
    if ((code = exit_code(child))) {
        snprintf(wrong, sizeof wrong, "failed to create container filesystem for image: %s", given[IMAGE]);
        return code;
    }
    if (needs_nvidia(sp)) {
        FILE *log = fopen(in(state, "log"), "w");
        fprintf(log, "[ERROR] Command not found: nvidia-container-cli, see https://github.com/NVIDIA/libnvidia-container\n" HOOK "\n");
        fclose(log);
        snprintf(wrong, sizeof wrong, "container start failed with error code: 1");
        return 1;
    }
    spank_getenv(sp, "HOME", home, sizeof home);
    if (pipe2(up, O_CLOEXEC))
        return 1;
    if (!(child = fork())) {  // lives as long as the step: a namespace needs somebody in it
        setsid();
        if (unshare(CLONE_NEWNS))
            snprintf(wrong, sizeof wrong, "couldn't unshare: %s", strerror(errno));
        else
            enter_new_root(home);
        if (write(up[1], wrong, sizeof wrong) < 0 || *wrong)
            _exit(1);
        for (int file = 0; file < 1024; file++)
            close(file);
        for (;;)
            pause();
    }
    close(up[1]);
    if (read(up[0], wrong, sizeof wrong) != sizeof wrong || *wrong)
        return 1;
    keeper = fopen(in(state, "keeper"), "w");
    fprintf(keeper, "%d", child);
    fclose(keeper);
    return 0;
}

static pid_t keeper_of_step(void)
{
    int pid = 0;
    FILE *file = fopen(in(state, "keeper"), "r");
    if (file && fscanf(file, "%d", &pid) != 1)
        pid = 0;
    if (file)
        fclose(file);
    return pid;
}

static int find(spank_t sp)  // whether this step has a container, and where its state is
{
    uint32_t job, step;
    from_environment(sp, "PYXIS_CONTAINER_IMAGE", IMAGE);
    from_environment(sp, "PYXIS_CONTAINER_MOUNTS", MOUNTS);
    if (!spank_remote(sp) || !given[IMAGE])
        return 0;
    spank_get_item(sp, S_JOB_ID, &job);
    spank_get_item(sp, S_JOB_STEPID, &step);
    spank_get_item(sp, S_JOB_UID, &uid);
    spank_get_item(sp, S_JOB_GID, &gid);
    snprintf(state, sizeof state, "/run/pyxis/%u/%u.%u", uid, job, step);  // the user's stays
    snprintf(root, sizeof root, "/run/enroot/pyxis_%u.%u", job, step);
    return step < SLURM_BATCH_SCRIPT;
}

int slurm_spank_task_init_privileged(spank_t sp, int argc, char *argv[])
{
    char path[PATH_SIZE];
    int lock, space;
    if (!find(sp))
        return 0;
    make(state, 0);
    make("/run/enroot", 0);
    chmod("/run/enroot", 01777);
    lock = open(in(state, "lock"), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    flock(lock, LOCK_EX);
    if (!access(in(state, "failed"), F_OK))
        snprintf(wrong, sizeof wrong, "container was not started successfully by another task");
    else if (!keeper_of_step() && (unpacking_failed = start(sp)))
        make(in(state, "failed"), 1);
    close(lock);
    if (*wrong)
        return 0;  // task_init tells: by then our words go to the task's own log
    snprintf(path, sizeof path, "/proc/%d/ns/mnt", keeper_of_step());
    space = open(path, O_RDONLY | O_CLOEXEC);
    if (space < 0 || setns(space, CLONE_NEWNS))
        snprintf(wrong, sizeof wrong, "couldn't join mount namespace: %s", strerror(errno));
    return 0;
}

static int explain(void)
{
    char line[PATH_SIZE];
    FILE *log = unpacking_failed ? fopen(in(state, "log"), "r") : NULL;
    int of_mounts = !strncmp(wrong, "--", 2);
    if (unpacking_failed && !of_mounts)
        slurm_error("pyxis: child %d failed with error code: %d", getpid(), unpacking_failed);
    slurm_error("pyxis: %s", wrong);
    if (of_mounts)
        slurm_error("pyxis: couldn't create enroot start configuration script");
    if (log)
        slurm_error("pyxis: printing enroot log file:");
    if (of_mounts)
        slurm_error("pyxis:     [INFO] Extracting squashfs filesystem...");
    while (log && fgets(line, sizeof line, log)) {
        line[strcspn(line, "\n")] = 0;
        slurm_error("pyxis:     %s", line);
    }
    if (of_mounts)
        slurm_error("pyxis: container was not started successfully by another task");
    return -1;
}

static void set_environment(spank_t sp)
{
    char line[1 << 16], old[8], *dropped[] = {"LANG", "LANGUAGE", "LC_ALL"};
    FILE *file = fopen("/etc/environment", "r"), *profile = fopen("/etc/profile", "r");
    for (int i = 0; i < 3; i++)
        spank_unsetenv(sp, dropped[i]);
    if (!is_in_list(given[ENV], "PATH"))
        spank_setenv(sp, "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    while (file && fgets(line, sizeof line, file)) {
        char *value = strchr(line, '=');
        line[strcspn(line, "\n")] = 0;
        if (!value)
            continue;
        *value++ = 0;
        spank_err_t found = spank_getenv(sp, line, old, sizeof old);
        if (!is_in_list(given[ENV], line) || found == ESPANK_ENV_NOEXIST)
            spank_setenv(sp, line, value, 1);
    }
    while (profile && fgets(line, sizeof line, profile))  // a login shell runs it: Debian's forgets ours
        if (strstr(line, "PATH=\"/usr") && !is_in_list(given[ENV], "PATH"))
            spank_setenv(sp, "PATH", "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games", 1);
}

int slurm_spank_task_init(spank_t sp, int argc, char *argv[])
{
    char line[PATH_SIZE], work[PATH_SIZE] = "/";
    FILE *rc;
    if (!*state)
        return 0;
    if (*wrong)
        return explain();
    set_environment(sp);
    for (rc = fopen("/etc/rc", "r"); rc && fgets(line, sizeof line, rc);)
        sscanf(line, "cd \"%4000[^\"]\"", work);
    if (given[WORKDIR])
        snprintf(work, sizeof work, "%s", given[WORKDIR]);
    if (chdir(work)) {
        slurm_error("pyxis: couldn't chdir to %s: %s", work, strerror(errno));
        return -1;
    }
    return 0;
}

static void clean_up(void)
{
    pid_t child;
    if (keeper_of_step())
        kill(keeper_of_step(), SIGKILL);
    if (!(child = fork())) {
        execlp("rm", "rm", "-rf", root, state, NULL);
        _exit(1);
    }
    exit_code(child);
}

int slurm_spank_task_exit(spank_t sp, int argc, char *argv[])
{
    uint32_t tasks = 0;
    if (find(sp) && spank_get_item(sp, S_JOB_LOCAL_TASK_COUNT, &tasks) == ESPANK_SUCCESS && ++ended == (int)tasks)
        clean_up();
    return 0;
}

int slurm_spank_exit(spank_t sp, int argc, char *argv[])
{
    if (spank_context() == S_CTX_REMOTE && *state) {
        if (unpacking_failed && access(root, F_OK))  // what is not there cannot be removed
            slurm_error("pyxis: child %d failed with error code: 1", getpid());
        clean_up();
    }
    return 0;
}
