/*
 * Measures the pager, beside a bare handler of its own in the same run (scripts/support/bench/pager.py).
 * Prints NAME VALUE lines: microseconds for faults, bytes a second for the others.
 */
#define _GNU_SOURCE
#include "../../../native/pager.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ull
#define PIECE (2ull << 20)
#define SIZE (512ull << 20)
#define FAULTS 10000
#define THREADS 8

static double now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
}

static void need(int right, const char *what)
{
    if (!right) {
        perror(what);
        exit(1);
    }
}

struct memory {
    uint8_t *at;
    int uffd;
};

static struct memory new_memory(void)
{
    struct memory made = {mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
                          (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)};
    struct uffdio_api api = {UFFD_API, 0, 0};
    struct uffdio_register one = {{(uintptr_t)made.at, SIZE}, UFFDIO_REGISTER_MODE_MISSING, 0};

    need(made.at != MAP_FAILED && madvise(made.at, SIZE, MADV_NOHUGEPAGE) == 0, "memory");
    need(made.uffd >= 0 && ioctl(made.uffd, UFFDIO_API, &api) == 0, "userfaultfd");
    need(ioctl(made.uffd, UFFDIO_REGISTER, &one) == 0, "UFFDIO_REGISTER");
    return made;
}

static void free_memory(struct memory memory)
{
    munmap(memory.at, SIZE);
    close(memory.uffd);
}

struct bare {
    struct memory memory;
    const uint8_t *source;
    int stop[2];
};

static void *bare_handler(void *argument)
{
    struct bare *self = argument;

    for (;;) {
        struct pollfd fds[2] = {{self->memory.uffd, POLLIN, 0}, {self->stop[0], POLLIN, 0}};
        struct uffd_msg messages[16];
        ssize_t got;

        poll(fds, 2, -1);
        if (fds[1].revents)
            return NULL;
        got = read(self->memory.uffd, messages, sizeof messages);
        for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++) {
            uint64_t address = messages[i].arg.pagefault.address & ~(PAGE - 1);
            uint64_t offset = address - (uintptr_t)self->memory.at;
            struct uffdio_copy copy = {address, (uintptr_t)self->source + offset, PAGE, 0, 0};

            ioctl(self->memory.uffd, UFFDIO_COPY, &copy);
        }
    }
}

struct toucher {
    const uint8_t *at;
    unsigned seed;
    double *seconds;
    unsigned count;
};

static void *touch(void *argument)
{
    struct toucher *self = argument;
    volatile uint8_t sum = 0;

    for (unsigned i = 0; i < self->count; i++) {
        size_t page = (size_t)rand_r(&self->seed) * 7919 % (SIZE / PAGE);
        double begun = now();

        sum = (uint8_t)(sum + *(volatile const uint8_t *)(self->at + page * PAGE));
        self->seconds[i] = now() - begun;
    }
    return NULL;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void touch_all(const char *name, const uint8_t *at, unsigned threads)
{
    static double seconds[FAULTS];
    struct toucher touchers[THREADS];
    pthread_t running[THREADS];
    double begun = now();

    for (unsigned i = 0; i < threads; i++) {
        touchers[i] = (struct toucher){at, i + 1, seconds + FAULTS / threads * i, FAULTS / threads};
        need(pthread_create(&running[i], NULL, touch, &touchers[i]) == 0, "thread");
    }
    for (unsigned i = 0; i < threads; i++)
        pthread_join(running[i], NULL);
    printf("%s-%u-rate %.1f\n", name, threads, FAULTS / (now() - begun));
    qsort(seconds, FAULTS, sizeof *seconds, compare);
    printf("%s-%u-p50 %.2f\n%s-%u-p99 %.2f\n", name, threads, seconds[FAULTS / 2] * 1e6, name, threads,
           seconds[FAULTS * 99 / 100] * 1e6);
}

static void measure_bare(const uint8_t *source)
{
    for (unsigned threads = 1; threads <= THREADS; threads += THREADS - 1) {
        struct bare bare = {new_memory(), source, {0, 0}};
        pthread_t handler;

        need(pipe(bare.stop) == 0 && pthread_create(&handler, NULL, bare_handler, &bare) == 0, "handler");
        touch_all("bare", bare.memory.at, threads);
        need(write(bare.stop[1], "", 1) == 1, "stop");
        pthread_join(handler, NULL);
        close(bare.stop[0]);
        close(bare.stop[1]);
        free_memory(bare.memory);
    }
}

/* In a thread, as the pager installs: what the memory's owner has freed is in another processor's caches. */
struct ioctls {
    int uffd;
    uint8_t *at;
    const uint8_t *source; /* NULL: zeros */
};

static void *install_all(void *argument)
{
    struct ioctls *self = argument;

    for (uint64_t at = 0; at < SIZE; at += PIECE) {
        struct uffdio_copy copy = {(uintptr_t)self->at + at, (uintptr_t)self->source + at, PIECE, 0, 0};
        struct uffdio_zeropage zero = {{(uintptr_t)self->at + at, PIECE}, 0, 0};

        need((self->source ? ioctl(self->uffd, UFFDIO_COPY, &copy) : ioctl(self->uffd, UFFDIO_ZEROPAGE, &zero)) == 0,
             "UFFDIO_COPY or UFFDIO_ZEROPAGE");
    }
    return NULL;
}

static void measure_ioctls(const char *name, const uint8_t *source)
{
    struct memory memory = new_memory();
    struct ioctls all = {memory.uffd, memory.at, source};
    pthread_t thread;
    double begun = now();

    need(pthread_create(&thread, NULL, install_all, &all) == 0, "thread");
    pthread_join(thread, NULL);
    printf("%s %.0f\n", name, (double)SIZE / (now() - begun));
    free_memory(memory);
}

static int new_file(uint64_t size)
{
    int fd = memfd_create("bench", MFD_CLOEXEC);

    need(fd >= 0 && ftruncate(fd, (off_t)size) == 0, "memfd");
    return fd;
}

/* threads 0: nothing is touched; the time until all is installed ahead is measured. */
static void measure_pager(const char *name, int cache, int present, int ahead, unsigned threads)
{
    struct memory memory = new_memory();
    struct imagefs_pager_region region = {(uintptr_t)memory.at, SIZE, 0, PAGE};
    int state = new_file(imagefs_pager_state_size(SIZE / PAGE));
    struct imagefs_pager_options options = {.uffd = memory.uffd, .state_fd = state, .memory_fd = cache,
                                            .cache_fd = cache, .present_fd = present, .arrivals_fd = -1,
                                            .trace_fd = -1, .ahead = (uint32_t)ahead, .pages = SIZE / PAGE,
                                            .regions = &region, .region_count = 1};
    char why[200] = "";
    struct imagefs_pager *pager = imagefs_pager_create(&options, why, sizeof why);
    struct imagefs_pager_statistics counted = {0};
    double begun = now();

    if (!pager)
        fprintf(stderr, "%s\n", why);
    need(pager && imagefs_pager_start(pager) == 0, "pager");
    if (threads) {
        touch_all(name, memory.at, threads);
    } else {
        while (counted.copied_pages + counted.zero_pages < SIZE / PAGE) {
            usleep(20); /* of the 3 ms that zeros take, little */
            imagefs_pager_get_statistics(pager, &counted);
        }
        printf("%s %.0f\n", name, (double)SIZE / (now() - begun));
    }
    need(imagefs_pager_destroy(pager, 10000), "pager: end");
    close(state);
    free_memory(memory);
}

/* The argument is the directory of the cache's file, which stays in the page cache. */
int main(int argc, char **argv)
{
    int cache = open(argc > 1 ? argv[1] : ".", O_RDWR | O_TMPFILE, 0600);
    int empty = new_file(SIZE), present = new_file(SIZE / PAGE / 8);
    uint8_t *source = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *bits = mmap(NULL, SIZE / PAGE / 8, PROT_READ | PROT_WRITE, MAP_SHARED, present, 0);

    need(cache >= 0 && ftruncate(cache, SIZE) == 0, "cache");
    need(source != MAP_FAILED && bits != MAP_FAILED, "mmap");
    for (uint64_t at = 0; at < SIZE; at += 8)
        memcpy(source + at, &(uint64_t){at * 0x9e3779b97f4a7c15ull + 1}, 8);
    memset(bits, 0xff, SIZE / PAGE / 8);
    for (uint64_t at = 0; at < SIZE; at += PIECE)
        need(pwrite(cache, source + at, PIECE, (off_t)at) == (ssize_t)PIECE, "cache");
    measure_bare(source);
    measure_ioctls("copy", source);
    measure_ioctls("zeropage", NULL);
    measure_pager("pager", cache, present, 0, 1);
    measure_pager("pager", cache, present, 0, THREADS);
    measure_pager("ahead", cache, present, 1, THREADS);
    measure_pager("install", cache, present, 1, 0);
    measure_pager("zeros", empty, present, 1, 0);
    return 0;
}
