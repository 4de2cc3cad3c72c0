/*
 * Driver for the pager (tests/native/test_pager.py): a VMM in a process of its own, which checks every byte that it
 * reads, and pagers in others. Arguments: the seed, and the name of a scenario.
 */
#define _GNU_SOURCE
#include "pager.h"
#include "pages.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what)                                                                                    \
    do {                                                                                               \
        if (!(what)) {                                                                                 \
            fprintf(stderr, "%s:%d: not true: %s (errno %d)\n", __FILE__, __LINE__, #what, errno);     \
            _exit(1);                                                                                  \
        }                                                                                              \
    } while (0)

#define PAGE 4096u
#define PAGES 4096u /* 16 MiB, in two regions */
#define HALF (PAGES / 2)
#define THREADS 4
#define BLOCK 8u /* pages that one thread owns */

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Word i of a page of the image; every fifth page, and one long run, is zeros. */
static uint64_t word(uint64_t page, unsigned i)
{
    return page % 5 == 0 || (page >= 1000 && page < 1700) ? 0 : (page + 1) * 0x9e3779b97f4a7c15ull + i;
}

static int is_image(const uint64_t *at, uint64_t page)
{
    for (unsigned i = 0; i < PAGE / 8; i++)
        if (at[i] != word(page, i))
            return 0;
    return 1;
}

static int is_filled(const uint64_t *at, uint64_t value)
{
    for (unsigned i = 0; i < PAGE / 8; i++)
        if (at[i] != value)
            return 0;
    return 1;
}

/* ---- the VMM ---- */

struct vmm {
    uint8_t *half[2];
    uint64_t seed;
    int give_back;
    unsigned touches;
};

struct toucher {
    struct vmm *vmm;
    unsigned number;
};

static uint64_t *page_at(const struct vmm *vmm, uint64_t page)
{
    return (uint64_t *)(void *)(vmm->half[page / HALF] + page % HALF * PAGE);
}

/* Touches its own blocks at random, and those of all (every fifth block, never changed). */
static void *touch(void *argument)
{
    const struct toucher *self = argument;
    const struct vmm *vmm = self->vmm;
    uint64_t state = vmm->seed + self->number * 77 + 1;
    uint64_t *expected = calloc(PAGES, sizeof *expected); /* 0: the image; 1: zeros; else the word that fills it */

    CHECK(expected);
    for (unsigned n = 0; n < vmm->touches; n++) {
        uint64_t page = next_random(&state) % PAGES, owner = page / BLOCK % (THREADS + 1), action;
        uint64_t *at = page_at(vmm, page);

        if (owner != self->number && owner != THREADS)
            continue;
        CHECK(expected[page] ? is_filled(at, expected[page] == 1 ? 0 : expected[page]) : is_image(at, page));
        action = next_random(&state) % 16;
        if (owner == THREADS || !vmm->give_back)
            continue;
        if (action == 0) {
            expected[page] = next_random(&state) | 2;
            for (unsigned i = 0; i < PAGE / 8; i++)
                at[i] = expected[page];
        } else if (action == 1) {
            /* To the end of the block, touched before or not. */
            uint64_t count = BLOCK - page % BLOCK;

            CHECK(madvise(at, count * PAGE, MADV_DONTNEED) == 0);
            for (uint64_t i = 0; i < count; i++)
                expected[page + i] = 1;
        }
    }
    free(expected);
    return NULL;
}

static void send_fd(int through, int fd, const struct imagefs_pager_region *regions)
{
    char control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec body = {(void *)(uintptr_t)regions, 2 * sizeof *regions};
    struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    CHECK(sendmsg(through, &message, 0) == (ssize_t)body.iov_len);
}

static int receive_fd(int through, struct imagefs_pager_region *regions)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec body = {regions, 2 * sizeof *regions};
    struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    int fd;

    CHECK(recvmsg(through, &message, MSG_CMSG_CLOEXEC) == (ssize_t)body.iov_len);
    CHECK(CMSG_FIRSTHDR(&message));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

/* Map, register, hand over. The userfaultfd stays open: when a pager dies, touches wait. */
static void vmm_begin(struct vmm *vmm, int through)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {UFFD_API,
                             UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP |
                                 UFFD_FEATURE_EVENT_FORK,
                             0};
    struct imagefs_pager_region regions[2];

    CHECK(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0);
    for (unsigned i = 0; i < 2; i++) {
        void *at = mmap(NULL, HALF * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        struct uffdio_register one = {{(uintptr_t)at, HALF * PAGE}, UFFDIO_REGISTER_MODE_MISSING, 0};

        CHECK(at != MAP_FAILED && ioctl(uffd, UFFDIO_REGISTER, &one) == 0);
        CHECK(madvise(at, HALF * PAGE, i ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0);
        vmm->half[i] = at;
        regions[i] = (struct imagefs_pager_region){(uintptr_t)at, HALF * PAGE, (uint64_t)i * HALF * PAGE, PAGE};
    }
    send_fd(through, uffd, regions);
}

static void vmm_touch(struct vmm *vmm)
{
    pthread_t threads[THREADS];
    struct toucher touchers[THREADS];

    for (unsigned i = 0; i < THREADS; i++) {
        touchers[i] = (struct toucher){vmm, i};
        CHECK(pthread_create(&threads[i], NULL, touch, &touchers[i]) == 0);
    }
    for (unsigned i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

/* Move the middle of the first half, with what has been touched of it and what has not. */
static void vmm_move(struct vmm *vmm)
{
    size_t size = 256 * PAGE;
    uint8_t *from = vmm->half[0] + 512 * PAGE;
    uint8_t *room = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(is_image(page_at(vmm, 600), 600));
    CHECK(room != MAP_FAILED && mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, room) == room);
    for (uint64_t i = 0; i < 256; i++)
        CHECK(is_image((uint64_t *)(void *)(room + i * PAGE), 512 + i));
    CHECK(madvise(room, 16 * PAGE, MADV_DONTNEED) == 0);
    for (uint64_t i = 0; i < 32; i++)
        CHECK(i < 16 ? is_filled((uint64_t *)(void *)(room + i * PAGE), 0)
                     : is_image((uint64_t *)(void *)(room + i * PAGE), 512 + i));
    CHECK(munmap(room, size) == 0);
    CHECK(is_image(page_at(vmm, 511), 511) && is_image(page_at(vmm, 768), 768));
}

/* A child that executes nothing and touches nothing missing ends as if there were no pager. */
static void vmm_fork(struct vmm *vmm)
{
    pid_t child;
    int status;

    CHECK(is_image(page_at(vmm, 3001), 3001));
    child = fork();
    CHECK(child >= 0);
    if (child == 0)
        _exit(is_image(page_at(vmm, 3001), 3001) ? 0 : 1);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

/* ---- the owner ---- */

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
            words[i] = word(page, i);
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

static pid_t begin_vmm(uint64_t seed, int give_back, unsigned touches, int *uffd, struct imagefs_pager_region *regions)
{
    int ends[2];
    pid_t pid;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        struct vmm vmm = {.seed = seed, .give_back = give_back, .touches = touches};
        char go;

        vmm_begin(&vmm, ends[0]);
        /* Whoever handed us over must have it before we go on. */
        CHECK(read(ends[0], &go, 1) == 1);
        if (!give_back) {
            vmm_move(&vmm);
            vmm_fork(&vmm);
            _exit(0);
        }
        vmm_touch(&vmm);
        _exit(0);
    }
    *uffd = receive_fd(ends[1], regions);
    CHECK(write(ends[1], "g", 1) == 1);
    return pid;
}

static void expect_success(pid_t pid)
{
    int status;

    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(status == 0);
}

/* Random touches and pages given back, with and without the background installer, a third of the pages not cached. */
static void serve(uint64_t seed, int give_back)
{
    for (int ahead = 0; ahead < 2; ahead++) {
        struct sources from = make_sources(3);
        struct imagefs_pager_region regions[2];
        struct imagefs_pager_statistics counted;
        int uffd;
        pid_t vmm = begin_vmm(seed + (uint64_t)ahead, give_back, 8000, &uffd, regions);
        struct imagefs_pager *pager = make_pager(&from, uffd, regions, ahead);

        expect_success(vmm);
        CHECK(imagefs_pager_get_status(pager) != IMAGEFS_PAGER_FAILED);
        imagefs_pager_get_statistics(pager, &counted);
        CHECK(counted.faults > 0 && counted.copied_pages > 0 && counted.takeovers == 0);
        if (give_back)
            CHECK(counted.removed_pages > 0 && counted.from_nothing > 0);
        else
            CHECK(counted.remaps == 1 && counted.unmaps >= 1 && counted.forks == 1 && counted.removed_pages == 16);
        CHECK(ahead || counted.ahead_pages == 0);
        CHECK(imagefs_pager_destroy(pager, 10000));
        close(uffd);
    }
}

/* SIGKILL the pager again and again; the state and the userfaultfd stay with us. */
static void kills(uint64_t seed)
{
    struct sources from = make_sources(3);
    struct imagefs_pager_region regions[2];
    struct imagefs_pager_statistics counted = {0};
    unsigned killed = 0;
    uint64_t state = seed;
    int uffd, status, ended = 0;
    pid_t vmm = begin_vmm(seed, 1, 100000, &uffd, regions);

    while (!ended) {
        pid_t helper = fork();
        uint64_t before = counted.faults, enough = next_random(&state) % 40 + 1;

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
    pid_t vmm = begin_vmm(seed, 1, 2000, &uffd, regions);

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
    pid_t vmm = begin_vmm(seed, 1, 1000000000, &uffd, regions);

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
    pid_t vmm = begin_vmm(seed, 1, 400000, &uffd, regions);
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

int main(int argc, char **argv)
{
    uint64_t seed;

    CHECK(argc == 3);
    seed = strtoull(argv[1], NULL, 10) | 1;
    if (strcmp(argv[2], "touches") == 0)
        serve(seed, 1);
    else if (strcmp(argv[2], "events") == 0)
        serve(seed, 0);
    else if (strcmp(argv[2], "kills") == 0)
        kills(seed);
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
