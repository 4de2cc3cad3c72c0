#define _GNU_SOURCE
#include "preload_pager.h"

#include "userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096u

/* Interposed functions have no argument to carry a context in. */
static struct {
    struct sockaddr_un address; /* set once, before threads */
    int state;                  /* -1: none */
    bool taken;                 /* atomic: the one mapping has been, or is being, made */
    bool substituted;           /* atomic: what follows is set */
    dev_t device;
    ino_t inode;
} pager = {.state = -1};

bool imagefs_preload_pager_start(void)
{
    const char *path = getenv("IMAGEFS_PAGER"), *state = getenv("IMAGEFS_PAGER_STATE");

    if (!path || !*path)
        return false;
    pager.address.sun_family = AF_UNIX;
    snprintf(pager.address.sun_path, sizeof pager.address.sun_path, "%s", path);
    if (state && *state)
        pager.state = (int)strtol(state, NULL, 10);
    return true;
}

bool imagefs_preload_pager_is_substitute(int fd)
{
    struct stat status;

    return __atomic_load_n(&pager.substituted, __ATOMIC_ACQUIRE) && fstat(fd, &status) == 0 &&
           status.st_dev == pager.device && status.st_ino == pager.inode;
}

static int complain(const char *what, int error)
{
    dprintf(STDERR_FILENO, "imagefs: guest memory cannot be handed to the pager: %s: %s\n", what, strerror(error));
    return error;
}

/* One message: the region, and the userfaultfd along with it. The socket stays open: its hangup says that we ended. */
static int send_region(int uffd, uintptr_t start, size_t size, off_t offset)
{
    char body[256], control[CMSG_SPACE(sizeof uffd)] = {0};
    struct iovec text = {body, 0};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    int through = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int error;

    if (through < 0 || connect(through, (const struct sockaddr *)&pager.address, sizeof pager.address)) {
        error = complain(pager.address.sun_path, errno);
        if (through >= 0)
            close(through);
        return error;
    }
    text.iov_len = (size_t)snprintf(body, sizeof body,
                                    "[{\"base_host_virt_addr\":%llu,\"size\":%llu,\"offset\":%llu,"
                                    "\"page_size\":%u,\"userfaultfd\":%d}]",
                                    (unsigned long long)start, (unsigned long long)size, (unsigned long long)offset,
                                    PAGE, uffd);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof uffd);
    memcpy(CMSG_DATA(header), &uffd, sizeof uffd);
    if (sendmsg(through, &message, MSG_NOSIGNAL) == (ssize_t)text.iov_len)
        return 0;
    error = complain(pager.address.sun_path, errno);
    close(through);
    return error;
}

/* An empty file of the same size behind the same number. */
static int substitute(int fd)
{
    struct stat status;
    int flags = fcntl(fd, F_GETFD), empty = memfd_create("imagefs-memory", MFD_CLOEXEC), error = 0;

    if (flags < 0 || empty < 0 || fstat(fd, &status) || ftruncate(empty, status.st_size) || fstat(empty, &status) ||
        dup3(empty, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0) < 0) {
        error = complain("an empty file in its place", errno);
    } else {
        pager.device = status.st_dev;
        pager.inode = status.st_ino;
        __atomic_store_n(&pager.substituted, true, __ATOMIC_RELEASE);
    }
    if (empty >= 0)
        close(empty);
    return error;
}

static int hand_over(uintptr_t start, size_t size, int fd, off_t offset)
{
    int uffd = imagefs_userfault_open(1), error;

    if (uffd == -EPERM)
        return complain("userfaultfd is not permitted (sysctl vm.unprivileged_userfaultfd=1, the capability "
                        "CAP_SYS_PTRACE, or /dev/userfaultfd open to this user)",
                        EPERM);
    if (uffd < 0)
        return complain("userfaultfd", -uffd);
    error = -imagefs_userfault_register(uffd, start, size);
    if (error)
        complain("userfaultfd", error);
    else
        error = substitute(fd);
    if (!error)
        error = send_region(uffd, start, size, offset);
    if (error)
        close(uffd);
    else if (pager.state >= 0)
        /* It came through exec, and goes no further. */
        fcntl(pager.state, F_SETFD, FD_CLOEXEC);
    return error;
}

void *imagefs_preload_pager_map(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    int kept = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_NORESERVE), error;
    size_t size = (length + PAGE - 1) & ~(size_t)(PAGE - 1);
    void *at;

    if ((flags & MAP_TYPE) != MAP_PRIVATE)
        error = complain("the VMM shares its memory with other processes", EINVAL);
    else if (__atomic_exchange_n(&pager.taken, true, __ATOMIC_ACQ_REL))
        error = complain("the VMM maps it a second time", EBUSY);
    else {
        /* Not through mmap(), which is ours. Accessible once it is handed over: a process that locks all of its memory
         * would be given zero pages here. */
        at = (void *)syscall(SYS_mmap, address, size, (long)PROT_NONE, (long)(kept | MAP_PRIVATE | MAP_ANONYMOUS), -1L,
                             0L);
        if (at == MAP_FAILED)
            return at;
        error = hand_over((uintptr_t)at, size, fd, offset);
        if (!error && mprotect(at, size, protection) == 0)
            return at;
        error = error ? error : errno;
        syscall(SYS_munmap, at, size);
    }
    errno = error;
    return MAP_FAILED;
}
