/* Where pages come from: the cache's sparse file, else the mount. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include "pages.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

int pager_is_present(const struct imagefs_pager *pager, uint64_t page, uint64_t count)
{
    return pager->present != NULL && imagefs_bits_all(pager->present, page, count);
}

/* pread(2) of all of it, by several calls if need be. 0, or an errno; ENODATA at the end of the file. */
static int read_all(int fd, uint64_t page, uint64_t count, uint8_t *out, int flags)
{
    size_t size = (size_t)count * PAGE, done = 0;

    while (done < size) {
        struct iovec rest = {out + done, size - done};
        ssize_t got = flags ? preadv2(fd, &rest, 1, (off_t)(page * PAGE + done), flags)
                            : pread(fd, rest.iov_base, rest.iov_len, (off_t)(page * PAGE + done));

        if (got > 0)
            done += (size_t)got;
        else if (got == 0)
            return ENODATA;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

int pager_read_cache(const struct imagefs_pager *pager, uint64_t page, uint64_t count, uint8_t *out, int wait)
{
    int error;

    if (!pager_is_present(pager, page, count))
        return ENOENT;
    error = read_all(pager->options.cache_fd, page, count, out, wait ? 0 : RWF_NOWAIT);
    if (error == 0 || (!wait && error == EAGAIN))
        return error;
    if (!wait && error == EOPNOTSUPP)
        return pager_read_cache(pager, page, count, out, 1);
    /* A bad disk, or a cache that someone cut: the mount can still have the page. */
    return ENOENT;
}

int pager_read_memory(const struct imagefs_pager *pager, uint64_t page, uint64_t count, uint8_t *out)
{
    return read_all(pager->options.memory_fd, page, count, out, 0);
}

int pager_cache_extent(const struct imagefs_pager *pager, uint64_t page, uint64_t *end)
{
    int fd = pager->options.cache_fd;
    off_t from = (off_t)(page * PAGE);
    off_t data = lseek(fd, from, SEEK_DATA);

    if (data < 0) {
        /* ENXIO: holes to the end. Other errors: no extents here, so all of it is data. */
        *end = pager->options.pages;
        return errno != ENXIO;
    }
    if ((uint64_t)data / PAGE > page) {
        *end = (uint64_t)data / PAGE;
        return 0;
    }
    data = lseek(fd, from, SEEK_HOLE);
    *end = data < 0 ? pager->options.pages : ((uint64_t)data + PAGE - 1) / PAGE;
    if (*end <= page)
        *end = page + 1;
    return 1;
}
