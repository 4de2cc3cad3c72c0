/*
 * LD_PRELOAD shim for a stock VMM that maps the guest memory file named by IMAGEFS_MEMORY.
 *
 * QEMU asks for huge pages on its RAM. On a file mapping the kernel takes that as leave to read 2 MiB around every
 * fault, and it does so even where the mapping is marked random: to the first tick of a 256 MiB guest that is 74 MiB
 * across the link instead of 3. So here, mappings of that file are marked MADV_RANDOM, and MADV_HUGEPAGE on
 * them becomes MADV_RANDOM. Everything else reaches the kernel as it was asked for.
 *
 * The VMM opens the file for writing, although what it writes goes to private pages. Then a mount must keep the kernel's
 * page cache out of it (direct I/O), and each mapping begins by dropping what is in the cache, of the guest's own and of
 * all others'. So it is opened for reading only, which a private mapping is content with.
 *
 * With a pager (IMAGEFS_PAGER) the file is not mapped at all: anonymous memory takes its place (preload_pager.c), and
 * all advice passes.
 *
 * Processes that the VMM starts inherit the shim. One that never maps the file sees no change but an fstat for
 * each file that it maps; without IMAGEFS_MEMORY not even that.
 *
 * System calls are made by syscall(2), not through dlsym(RTLD_NEXT): mmap may be called before dlsym works, and
 * dlsym itself may call mmap. glibc's own internal mappings do not pass through here.
 */
#define _GNU_SOURCE

#include "preload_pager.h"
#include "regions.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef __LP64__
#error "mmap and mmap64 are one and the same only where off_t is 64 bits wide"
#endif

#define INTERPOSE __attribute__((visibility("default")))

/* With _FORTIFY_SOURCE calls of open() without a mode arrive here. */
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);

/* Interposed functions have no argument to carry a context in: this is the shim's only state. */
static struct {
    const char *path; /* set once by the constructor, before threads; NULL: the shim does nothing */
    size_t page_size;
    bool paged; /* set once as well: guest memory goes to a pager */

    pthread_mutex_t lock; /* for all that follows; never held across a system call */
    bool identified;
    dev_t device; /* of path, once it was there to be identified */
    ino_t inode;
    struct imagefs_regions mapped;
} shim = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void lock(void)
{
    pthread_mutex_lock(&shim.lock);
}

static void unlock(void)
{
    pthread_mutex_unlock(&shim.lock);
}

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("IMAGEFS_MEMORY");

    if (!path || !*path)
        return;
    shim.page_size = (size_t)sysconf(_SC_PAGESIZE);
    shim.paged = imagefs_preload_pager_start();
    /* A child of fork must not inherit the lock from a thread that it does not have. */
    pthread_atfork(lock, unlock, unlock);
    shim.path = path;
}

static bool is_guest_memory(int fd)
{
    struct stat mapped, named;
    bool known, same;

    if (fstat(fd, &mapped) != 0 || !S_ISREG(mapped.st_mode))
        return false;
    lock();
    known = shim.identified;
    unlock();
    if (!known) {
        if (stat(shim.path, &named) != 0)
            return false;
        lock();
        shim.device = named.st_dev;
        shim.inode = named.st_ino;
        shim.identified = true;
        unlock();
    }
    lock();
    same = mapped.st_dev == shim.device && mapped.st_ino == shim.inode;
    unlock();
    return same;
}

/* madvise(2); returns 0 or an errno value, and leaves errno alone. */
static int kernel_advise(uintptr_t start, size_t length, int advice)
{
    int saved = errno;
    int error = syscall(SYS_madvise, start, length, (long)advice) == 0 ? 0 : errno;

    errno = saved;
    return error;
}

/* As kernel_advise, but for the parts of the range that are guest memory without huge pages. */
static int advise(uintptr_t start, size_t length, int advice)
{
    uintptr_t end = start + length;
    int first_error = 0;

    /* What the kernel refuses, or does nothing about, it shall see as it was asked. */
    if (!shim.path || advice != MADV_HUGEPAGE || start % shim.page_size || length == 0 || end < start)
        return kernel_advise(start, length, advice);

    while (start < end) {
        struct imagefs_region part = {end, end};
        int error = 0;

        lock();
        imagefs_regions_next(&shim.mapped, start, end, &part);
        unlock();
        if (start < part.start)
            error = kernel_advise(start, part.start - start, advice);
        if (!first_error)
            first_error = error;
        if (part.start < part.end)
            error = kernel_advise(part.start, part.end - part.start, MADV_RANDOM);
        if (!first_error)
            first_error = error;
        start = part.end;
    }
    return first_error;
}

/* [start, start + length) in whole pages; false where that is no range at all. */
static bool pages_of(uintptr_t start, size_t length, struct imagefs_region *range)
{
    uintptr_t mask = shim.page_size - 1;

    if (length == 0 || start & mask || start + length < start || start + length > UINTPTR_MAX - mask)
        return false;
    *range = (struct imagefs_region){start, (start + length + mask) & ~mask};
    return true;
}

static void mapped(uintptr_t start, size_t length, bool guest_memory)
{
    struct imagefs_region range;

    if (!pages_of(start, length, &range))
        return;
    lock();
    if (guest_memory)
        /* When the table is full, a later MADV_HUGEPAGE passes: slow, not wrong. */
        (void)imagefs_regions_add(&shim.mapped, range.start, range.end);
    else
        imagefs_regions_remove(&shim.mapped, range.start, range.end);
    unlock();
    if (guest_memory)
        (void)kernel_advise(range.start, range.end - range.start, MADV_RANDOM);
}

static int open_at_cwd(const char *path, int flags, mode_t mode)
{
    if (shim.path && (flags & (O_ACCMODE | O_TRUNC)) == O_RDWR && path && strcmp(path, shim.path) == 0)
        flags = (flags & ~O_ACCMODE) | O_RDONLY;
    return (int)syscall(SYS_openat, (long)AT_FDCWD, path, (long)flags, (long)mode);
}

INTERPOSE int open(const char *path, int flags, ...)
{
    mode_t mode = 0;
    va_list more;

    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {
        va_start(more, flags);
        mode = va_arg(more, mode_t);
        va_end(more);
    }
    return open_at_cwd(path, flags, mode);
}

INTERPOSE int open64(const char *path, int flags, ...) __attribute__((alias("open")));

INTERPOSE int __open_2(const char *path, int flags)
{
    return open_at_cwd(path, flags, 0);
}

INTERPOSE int __open64_2(const char *path, int flags) __attribute__((alias("__open_2")));

INTERPOSE void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    long at;
    int saved;

    if (shim.paged && !(flags & MAP_ANONYMOUS) && (is_guest_memory(fd) || imagefs_preload_pager_is_substitute(fd)))
        return imagefs_preload_pager_map(address, length, protection, flags, fd, offset);
    at = syscall(SYS_mmap, address, length, (long)protection, (long)flags, (long)fd, offset);
    saved = errno;
    if (at == -1)
        return MAP_FAILED;
    if (shim.path && !shim.paged) {
        mapped((uintptr_t)at, length, !(flags & MAP_ANONYMOUS) && is_guest_memory(fd));
        errno = saved;
    }
    return (void *)at;
}

INTERPOSE void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
    __attribute__((alias("mmap")));

INTERPOSE int munmap(void *address, size_t length)
{
    struct imagefs_region range;

    /* Before the call: after it, another thread may have mapped the file at the same place. */
    if (shim.path && pages_of((uintptr_t)address, length, &range)) {
        lock();
        imagefs_regions_remove(&shim.mapped, range.start, range.end);
        unlock();
    }
    return (int)syscall(SYS_munmap, address, length);
}

INTERPOSE int madvise(void *address, size_t length, int advice)
{
    int error = advise((uintptr_t)address, length, advice);

    if (error)
        errno = error;
    return error ? -1 : 0;
}

INTERPOSE int posix_madvise(void *address, size_t length, int advice)
{
    /* As glibc: what POSIX means by it changes no data, what Linux means by MADV_DONTNEED does. */
    if (advice == POSIX_MADV_DONTNEED)
        return 0;
    return advise((uintptr_t)address, length, advice);
}
