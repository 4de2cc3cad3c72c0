#define _GNU_SOURCE
#include "userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#ifndef SYS_pidfd_getfd /* Linux 5.6 */
#define SYS_pidfd_getfd 438
#endif

#define FLAGS (O_CLOEXEC | O_NONBLOCK)

static int from_device(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int uffd;

    if (device < 0)
        return -EPERM;
    uffd = ioctl(device, USERFAULTFD_IOC_NEW, FLAGS);
    if (uffd < 0)
        uffd = -errno;
    close(device);
    return uffd;
}

int imagefs_userfault_open(int moves)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE};
    int uffd = (int)syscall(SYS_userfaultfd, FLAGS);

    if (uffd < 0)
        uffd = errno == EPERM ? from_device() : -errno;
    if (uffd < 0)
        return uffd;
    if (moves)
        api.features |= UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP;
    if (ioctl(uffd, UFFDIO_API, &api)) {
        int error = errno;

        close(uffd);
        return -error;
    }
    return uffd;
}

int imagefs_userfault_register(int uffd, uintptr_t address, size_t size)
{
    struct uffdio_register all = {.range = {address, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};

    if (madvise((void *)address, size, MADV_DONTFORK) || ioctl(uffd, UFFDIO_REGISTER, &all))
        return -errno;
    return 0;
}

int imagefs_userfault_fetch(int pidfd, int fd)
{
    int fetched = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);

    return fetched < 0 ? -errno : fetched;
}
