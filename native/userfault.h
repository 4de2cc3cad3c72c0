/*
 * A VMM's side of userfaultfd(2): memory of this process whose missing pages somebody else brings.
 *
 * In the preload shim (native/preload_pager.c), and in the library for processes that page themselves
 * (imagefs/restore/memory_map.py). Nothing here allocates, and nothing touches the memory.
 */
#ifndef IMAGEFS_USERFAULT_H
#define IMAGEFS_USERFAULT_H

#include <stddef.h>
#include <stdint.h>

/* cdef begin */

/*
 * A userfaultfd of this process, non-blocking and close-on-exec, for missing pages of its own and of the kernel's
 * accesses; `moves` asks for the events of munmap and mremap besides those of pages given back. By the system call
 * where that is permitted, else by /dev/userfaultfd. Returns the file descriptor, which is the caller's, or -errno:
 * -EPERM where neither is permitted.
 */
int imagefs_userfault_open(int moves);

/*
 * Register [address, address + size), whole pages of a private anonymous mapping that is not forked from now on: a
 * child that has it without its pager would read zeros. Returns 0 or -errno.
 */
int imagefs_userfault_register(int uffd, uintptr_t address, size_t size);

/* A copy of another process's file descriptor (pidfd_getfd(2)), close-on-exec. Returns it, or -errno. */
int imagefs_userfault_fetch(int pidfd, int fd);

/* cdef end */

#endif
