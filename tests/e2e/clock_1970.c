/* Preloaded into a process, this makes its wall clock start at 1 000 s after the epoch, as on a gateway whose clock has no
   battery. Monotonic clocks stay as they are. */
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t begun;

static int read_clock(clockid_t id, struct timespec *now) { return (int)syscall(SYS_clock_gettime, id, now); }

static void set_back(struct timespec *now) {
    if (begun == 0) begun = now->tv_sec;
    now->tv_sec = now->tv_sec - begun + 1000;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = read_clock(id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) set_back(now);
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec exact;
    if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
