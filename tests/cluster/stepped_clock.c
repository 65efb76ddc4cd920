/* LD_PRELOAD for Python and bash: the wall clock is off by the seconds that the file
 * $STEPPED_CLOCK holds at that moment. The monotonic clock is not, as with a real step. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void)
{
    const char *path = getenv("STEPPED_CLOCK"), *program = program_invocation_short_name;
    char text[32] = "";
    int saved = errno, file;

    if (!path || (strncmp(program, "python", 6) && strcmp(program, "bash")))
        return 0;
    if ((file = open(path, O_RDONLY | O_CLOEXEC)) >= 0) {
        if (read(file, text, sizeof text - 1) < 0)
            text[0] = 0;
        close(file);
    }
    errno = saved;
    return atol(text);
}

int clock_gettime(clockid_t id, struct timespec *now)
{
    int result = syscall(SYS_clock_gettime, id, now);

    if (!result && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset();
    return result;
}

time_t time(time_t *where)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return where ? (*where = now.tv_sec) : now.tv_sec;
}

int gettimeofday(struct timeval *where, void *zone)
{
    struct timespec now;

    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    where->tv_sec = now.tv_sec;
    where->tv_usec = now.tv_nsec / 1000;
    return 0;
}
