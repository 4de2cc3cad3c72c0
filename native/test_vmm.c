#define _GNU_SOURCE
#include "test_vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define HALF (PAGES / 2)
#define THREADS 4
#define BLOCK 8u

uint64_t test_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Word i of a page of the image; every fifth page, and one long run, is zeros. */
uint64_t test_word(uint64_t page, unsigned i)
{
    return page % 5 == 0 || (page >= 1000 && page < 1700) ? 0 : (page + 1) * 0x9e3779b97f4a7c15ull + i;
}

static int is_image(const uint64_t *at, uint64_t page)
{
    for (unsigned i = 0; i < PAGE / 8; i++)
        if (at[i] != test_word(page, i))
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

struct vmm {
    enum vmm_kind kind;
    uint8_t *half[2];
    uint64_t seed;
    uint64_t block; /* pages that one thread owns */
    unsigned touches;
    int uffd;
    int through;
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
        uint64_t page = test_random(&state) % PAGES, owner = page / vmm->block % (THREADS + 1), action;
        uint64_t *at = page_at(vmm, page);

        if (owner != self->number && owner != THREADS)
            continue;
        CHECK(expected[page] ? is_filled(at, expected[page] == 1 ? 0 : expected[page]) : is_image(at, page));
        action = test_random(&state) % 16;
        if (owner == THREADS)
            continue;
        if (action == 0) {
            expected[page] = test_random(&state) | 2;
            for (unsigned i = 0; i < PAGE / 8; i++)
                at[i] = expected[page];
        } else if (action == 1) {
            /* To the end of the block, touched before or not; from its beginning where pages are large. */
            uint64_t first = vmm->kind == VMM_HUGE ? page - page % vmm->block : page;
            uint64_t count = vmm->block - first % vmm->block;

            CHECK(madvise(page_at(vmm, first), count * PAGE, MADV_DONTNEED) == 0);
            for (uint64_t i = 0; i < count; i++)
                expected[first + i] = 1;
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
static void vmm_begin(struct vmm *vmm)
{
    struct uffdio_api api = {UFFD_API,
                             UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP |
                                 UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_PAGEFAULT_FLAG_WP,
                             0};
    struct imagefs_pager_region regions[2];

    vmm->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    CHECK(vmm->uffd >= 0 && ioctl(vmm->uffd, UFFDIO_API, &api) == 0);
    for (unsigned i = 0; i < 2; i++) {
        int huge = i && vmm->kind == VMM_HUGE;
        void *at = mmap(NULL, HALF * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | (huge ? MAP_HUGETLB : 0), -1, 0);
        struct uffdio_register one = {
            {(uintptr_t)at, HALF * PAGE},
            UFFDIO_REGISTER_MODE_MISSING | (i ? 0 : UFFDIO_REGISTER_MODE_WP),
            0,
        };

        CHECK(at != MAP_FAILED && ioctl(vmm->uffd, UFFDIO_REGISTER, &one) == 0);
        CHECK(huge || madvise(at, HALF * PAGE, i ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0);
        vmm->half[i] = at;
        regions[i] = (struct imagefs_pager_region){(uintptr_t)at, HALF * PAGE, (uint64_t)i * HALF * PAGE,
                                                   huge ? HUGE_PAGE : PAGE};
    }
    send_fd(vmm->through, vmm->uffd, regions);
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

    CHECK(is_image(page_at(vmm, 3), 3) && is_image(page_at(vmm, 2), 2));
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

/* What the pager never set is lifted by it nevertheless. */
static void vmm_protect(struct vmm *vmm)
{
    uint64_t *at = page_at(vmm, 101);
    struct uffdio_writeprotect deny = {{(uintptr_t)at, PAGE}, UFFDIO_WRITEPROTECT_MODE_WP};

    CHECK(is_image(at, 101));
    CHECK(ioctl(vmm->uffd, UFFDIO_WRITEPROTECT, &deny) == 0);
    at[7]++;
    CHECK(at[6] == test_word(101, 6) && at[7] == test_word(101, 7) + 1);
}

/* A child that touches what its parent lacks. It waits for ever, and is killed. */
static void vmm_wait_in_child(struct vmm *vmm)
{
    pid_t child = fork();
    char end;

    CHECK(child >= 0);
    if (child == 0) {
        CHECK(*(volatile uint64_t *)page_at(vmm, 3) != 1);
        CHECK(write(vmm->through, "c", 1) == 1);
        _exit(0);
    }
    CHECK(read(vmm->through, &end, 1) == 1);
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
    CHECK(read(vmm->through, &end, 1) == 0);
}

pid_t test_vmm_begin(enum vmm_kind kind, uint64_t seed, unsigned touches, int *through, int *uffd,
                     struct imagefs_pager_region *regions)
{
    int ends[2];
    pid_t pid;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        struct vmm vmm = {.kind = kind, .seed = seed, .touches = touches, .through = ends[0],
                          .block = kind == VMM_HUGE ? 512 : BLOCK};
        char go;

        close(ends[1]);
        vmm_begin(&vmm);
        /* Whoever handed us over must have it before we go on. */
        CHECK(read(ends[0], &go, 1) == 1);
        if (kind == VMM_EVENTS) {
            vmm_move(&vmm);
            vmm_protect(&vmm);
            vmm_fork(&vmm);
        } else if (kind == VMM_FORKS) {
            vmm_wait_in_child(&vmm);
        } else {
            vmm_touch(&vmm);
        }
        _exit(0);
    }
    close(ends[0]);
    *uffd = receive_fd(ends[1], regions);
    *through = ends[1];
    return pid;
}
