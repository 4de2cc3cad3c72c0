/*
 * Driver for the pager (tests/native/test_pager.py): a VMM in a process of its own, which checks every byte that it
 * reads (test_vmm.c), and pagers in others. Arguments: the seed, and the name of a scenario.
 */
#define _GNU_SOURCE
#include "pager.h"
#include "pages.h"
#include "test_vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

struct sources {
    int state, memory, cache, present, arrivals;
};

static int new_file(size_t size)
{
    int fd = memfd_create("test", MFD_CLOEXEC);

    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

/* The image in `memory`, and of it in the cache what lies in chunks whose number is not a multiple of `absent`. */
static struct sources make_sources(unsigned absent)
{
    struct sources made = {new_file(imagefs_pager_state_size(PAGES)), new_file(PAGES * PAGE), new_file(PAGES * PAGE),
                           new_file(PAGES / 8), -1};
    uint8_t *present = mmap(NULL, PAGES / 8, PROT_READ | PROT_WRITE, MAP_SHARED, made.present, 0);

    CHECK(present != MAP_FAILED);
    for (uint64_t page = 0; page < PAGES; page++) {
        uint64_t words[PAGE / 8];

        for (unsigned i = 0; i < PAGE / 8; i++)
            words[i] = test_word(page, i);
        CHECK(pwrite(made.memory, words, PAGE, (off_t)(page * PAGE)) == PAGE);
        if (absent && page / 16 % absent == 0)
            continue;
        /* Zeros of whole chunks are holes; single zero pages are written. */
        if (page < 1000 || page >= 1700)
            CHECK(pwrite(made.cache, words, PAGE, (off_t)(page * PAGE)) == PAGE);
        imagefs_bits_set(present, page, 1);
    }
    munmap(present, PAGES / 8);
    return made;
}

static struct imagefs_pager *make_pager(const struct sources *from, int uffd,
                                        const struct imagefs_pager_region *regions, int ahead)
{
    struct imagefs_pager_options options = {.uffd = uffd, .state_fd = from->state, .memory_fd = from->memory,
                                            .cache_fd = from->cache, .present_fd = from->present,
                                            .arrivals_fd = from->arrivals, .trace_fd = -1, .ahead = (uint32_t)ahead,
                                            .fetch_threads = 4, .pages = PAGES, .regions = regions,
                                            .region_count = 2};
    char why[200] = "";
    struct imagefs_pager *pager = imagefs_pager_create(&options, why, sizeof why);

    if (pager == NULL)
        fprintf(stderr, "create: %s\n", why);
    CHECK(pager && imagefs_pager_start(pager) == 0);
    return pager;
}

/* A VMM that goes on at once: touches wait for whoever serves. */
static pid_t begin_vmm(enum vmm_kind kind, uint64_t seed, unsigned touches, int *uffd,
                       struct imagefs_pager_region *regions)
{
    int through;
    pid_t pid = test_vmm_begin(kind, seed, touches, &through, uffd, regions);

    CHECK(write(through, "g", 1) == 1);
    close(through);
    return pid;
}

static void expect_success(pid_t pid)
{
    int status;

    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(status == 0);
}

/* One page of the image, as if somebody had been first: its neighbours arrive together with it. */
static void install_page(int uffd, const struct imagefs_pager_region *region, uint64_t page)
{
    uint64_t words[PAGE / 8];
    struct uffdio_copy copy = {.dst = region->address + page * PAGE - region->offset, .src = (uintptr_t)words,
                               .len = PAGE};

    for (unsigned i = 0; i < PAGE / 8; i++)
        words[i] = test_word(page, i);
    CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0);
}

/* With and without the background installer, a third of the pages not cached. */
static void serve(uint64_t seed, enum vmm_kind kind)
{
    for (int ahead = 0; ahead < 2; ahead++) {
        /* No huge page would be there as a whole. */
        struct sources from = make_sources(kind == VMM_HUGE && ahead ? 0 : 3);
        struct imagefs_pager_region regions[2];
        struct imagefs_pager_statistics counted;
        int uffd, through;
        pid_t vmm = test_vmm_begin(kind, seed + (uint64_t)ahead, 8000, &through, &uffd, regions);
        struct imagefs_pager *pager;

        install_page(uffd, &regions[0], 2);
        CHECK(write(through, "g", 1) == 1);
        pager = make_pager(&from, uffd, regions, ahead);
        expect_success(vmm);
        CHECK(imagefs_pager_get_status(pager) != IMAGEFS_PAGER_FAILED);
        imagefs_pager_get_statistics(pager, &counted);
        CHECK(counted.faults > 0 && counted.copied_pages > 0 && counted.takeovers == 0);
        if (kind == VMM_EVENTS)
            CHECK(counted.remaps == 1 && counted.unmaps >= 1 && counted.forks == 1 && counted.removed_pages == 16 &&
                  counted.unprotected == 1 && counted.existed > 0);
        else
            CHECK(counted.removed_pages > 0 && counted.from_nothing > 0 && counted.again > 0);
        CHECK(ahead || counted.ahead_pages == 0);
        CHECK(imagefs_pager_destroy(pager, 10000));
        close(uffd);
        close(through);
    }
}

/* SIGKILL the pager again and again; the state and the userfaultfd stay with us. */
static void kills(uint64_t seed, enum vmm_kind kind, unsigned touches)
{
    struct sources from = make_sources(3);
    struct imagefs_pager_region regions[2];
    struct imagefs_pager_statistics counted = {0};
    unsigned killed = 0;
    uint64_t state = seed;
    int uffd, status, ended = 0;
    pid_t vmm = begin_vmm(kind, seed, touches, &uffd, regions);

    while (!ended) {
        pid_t helper = fork();
        uint64_t before = counted.faults, enough = test_random(&state) % 40 + 1;

        CHECK(helper >= 0);
        if (helper == 0) {
            struct pollfd end = {imagefs_pager_ended_fd(make_pager(&from, uffd, regions, 0)), POLLIN, 0};

            poll(&end, 1, -1);
            _exit(2);
        }
        while (!(ended = waitpid(vmm, &status, WNOHANG) == vmm) && counted.faults < before + enough) {
            usleep(50);
            imagefs_pager_state_statistics(from.state, &counted);
        }
        CHECK(kill(helper, SIGKILL) == 0);
        CHECK(waitpid(helper, NULL, 0) == helper);
        killed++;
    }
    CHECK(status == 0);
    if (killed < 50 || counted.takeovers < 50 || counted.from_nothing == 0) {
        fprintf(stderr, "only %u kills, %llu takeovers\n", killed, (unsigned long long)counted.takeovers);
        _exit(1);
    }
}

/* `memory` cannot be read: the pager ends and says which page; the VMM waits, and goes on with a pager that can. */
static void failing(uint64_t seed)
{
    struct sources from = make_sources(1), broken = from;
    struct imagefs_pager_region regions[2];
    struct imagefs_pager_failure failure;
    struct imagefs_pager *pager;
    struct pollfd end;
    int uffd;
    pid_t vmm = begin_vmm(VMM_TOUCHES, seed, 2000, &uffd, regions);

    broken.memory = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* EISDIR, as EIO would */
    pager = make_pager(&broken, uffd, regions, 1);
    end = (struct pollfd){imagefs_pager_ended_fd(pager), POLLIN, 0};
    CHECK(poll(&end, 1, 30000) == 1 && imagefs_pager_get_status(pager) == IMAGEFS_PAGER_FAILED);
    CHECK(imagefs_pager_get_failure(pager, &failure) && failure.error == EISDIR && failure.page < PAGES);
    CHECK(strstr(failure.text, "it cannot be read: Is a directory"));
    CHECK(waitpid(vmm, NULL, WNOHANG) == 0);
    CHECK(imagefs_pager_destroy(pager, 10000));
    pager = make_pager(&from, uffd, regions, 1);
    expect_success(vmm);
    CHECK(imagefs_pager_destroy(pager, 10000));
}

/* The VMM is killed: the next install says so, and the pager ends without a failure. */
static void gone(uint64_t seed)
{
    struct sources from = make_sources(0);
    struct imagefs_pager_region regions[2];
    struct imagefs_pager *pager;
    struct pollfd end;
    int uffd;
    pid_t vmm = begin_vmm(VMM_TOUCHES, seed, 1000000000, &uffd, regions);

    pager = make_pager(&from, uffd, regions, 0);
    CHECK(kill(vmm, SIGKILL) == 0 && waitpid(vmm, NULL, 0) == vmm);
    CHECK(imagefs_pager_destroy(pager, 10000));
    /* A new one finds out at its first install ahead. */
    pager = make_pager(&from, uffd, regions, 1);
    end = (struct pollfd){imagefs_pager_ended_fd(pager), POLLIN, 0};
    CHECK(poll(&end, 1, 30000) == 1 && imagefs_pager_get_status(pager) == IMAGEFS_PAGER_VMM_GONE);
    CHECK(imagefs_pager_destroy(pager, 10000));
}

/* All is here: the pager ends while the VMM still touches, writes and gives back, and the kernel alone serves it. */
static void complete(uint64_t seed)
{
    struct sources from = make_sources(0);
    struct imagefs_pager_region regions[2];
    struct imagefs_pager_statistics counted;
    struct imagefs_pager *pager;
    int uffd, arrivals[2], status;
    pid_t vmm = begin_vmm(VMM_TOUCHES, seed, 400000, &uffd, regions);
    struct pollfd end;

    CHECK(pipe(arrivals) == 0 && close(arrivals[1]) == 0);
    from.arrivals = arrivals[0];
    pager = make_pager(&from, uffd, regions, 1);
    end = (struct pollfd){imagefs_pager_ended_fd(pager), POLLIN, 0};
    CHECK(poll(&end, 1, 60000) == 1 && imagefs_pager_get_status(pager) == IMAGEFS_PAGER_COMPLETE);
    imagefs_pager_get_statistics(pager, &counted);
    CHECK(counted.copied_pages + counted.zero_pages + counted.removed_pages >= PAGES);
    CHECK(imagefs_pager_destroy(pager, 10000));
    CHECK(waitpid(vmm, &status, WNOHANG) == 0);
    /* What it was giving back at that very moment. */
    while (waitpid(vmm, &status, WNOHANG) == 0) {
        struct uffd_msg message;

        if (read(uffd, &message, sizeof message) != sizeof message)
            usleep(1000);
    }
    CHECK(status == 0);
    close(arrivals[0]);
}

/* All has come, and a forked VMM lives: its memory stays under userfaultfd until it has gone. */
static void forked(uint64_t seed)
{
    struct sources from = make_sources(1);
    struct imagefs_pager_region regions[2];
    struct imagefs_pager_statistics counted = {0};
    struct imagefs_pager *pager;
    struct pollfd watched[2];
    int uffd, through, arrivals[2];
    pid_t vmm = test_vmm_begin(VMM_FORKS, seed, 0, &through, &uffd, regions);

    CHECK(pipe(arrivals) == 0);
    from.arrivals = arrivals[0];
    pager = make_pager(&from, uffd, regions, 1);
    CHECK(write(through, "g", 1) == 1);
    while (counted.forks == 0) {
        usleep(1000);
        imagefs_pager_get_statistics(pager, &counted);
    }
    close(arrivals[1]);
    while (counted.copied_pages + counted.zero_pages < PAGES) {
        usleep(1000);
        imagefs_pager_get_statistics(pager, &counted);
    }
    watched[0] = (struct pollfd){imagefs_pager_ended_fd(pager), POLLIN, 0};
    watched[1] = (struct pollfd){through, POLLIN, 0};
    CHECK(poll(watched, 2, 300) == 0 && imagefs_pager_get_status(pager) == IMAGEFS_PAGER_RUNNING);
    CHECK(write(through, "k", 1) == 1);
    CHECK(poll(watched, 1, 30000) == 1 && imagefs_pager_get_status(pager) == IMAGEFS_PAGER_COMPLETE);
    close(through);
    expect_success(vmm);
    CHECK(imagefs_pager_destroy(pager, 10000));
    close(arrivals[0]);
}

int main(int argc, char **argv)
{
    uint64_t seed;

    CHECK(argc == 3);
    seed = strtoull(argv[1], NULL, 10) | 1;
    if (strcmp(argv[2], "touches") == 0)
        serve(seed, VMM_TOUCHES);
    else if (strcmp(argv[2], "events") == 0)
        serve(seed, VMM_EVENTS);
    else if (strcmp(argv[2], "kills") == 0)
        kills(seed, VMM_TOUCHES, 40000);
    else if (strcmp(argv[2], "huge") == 0)
        serve(seed, VMM_HUGE);
    else if (strcmp(argv[2], "huge-kills") == 0)
        kills(seed, VMM_HUGE, 8000);
    else if (strcmp(argv[2], "forked") == 0)
        forked(seed);
    else if (strcmp(argv[2], "failing") == 0)
        failing(seed);
    else if (strcmp(argv[2], "gone") == 0)
        gone(seed);
    else if (strcmp(argv[2], "complete") == 0)
        complete(seed);
    else
        CHECK(!"a scenario");
    puts("pager: all true");
    return 0;
}
