/* LD_PRELOAD for QEMU 7.2: it opens the RAM file that READONLY_FILE names for reading only, where it would fail to open
 * it for writing too. With share=off it maps the file privately, which needs no more. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int __open64_2(const char *path, int flags);

/* What open() is in a program that was compiled with _FORTIFY_SOURCE, as Debian's QEMU is. */
int __open64_2(const char *path, int flags)
{
    const char *file = getenv("READONLY_FILE");

    if (file && strcmp(path, file) == 0)
        flags = (flags & ~O_ACCMODE) | O_RDONLY;
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0);
}
