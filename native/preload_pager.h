/*
 * The preload shim's way to a pager: guest memory becomes anonymous memory, handed over by Firecracker's handshake.
 *
 * IMAGEFS_PAGER        the socket on which `imagefs restore --door pager` listens
 * IMAGEFS_PAGER_STATE  number of an open file: the pager's state, which this process keeps for the pager after next
 *
 * The userfaultfd and the state stay open here until the process ends: as long as they do, a touch of a page that no
 * pager has brought waits, and never reads zeros (docs/pager.md).
 */
#ifndef IMAGEFS_PRELOAD_PAGER_H
#define IMAGEFS_PRELOAD_PAGER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

/* Read the environment; before there are threads. Whether memory is to be handed over. */
bool imagefs_preload_pager_start(void);

/* Whether the file is the empty one that took the place of guest memory. */
bool imagefs_preload_pager_is_substitute(int fd);

/*
 * mmap(2) of guest memory `fd`, in which the pager's memory takes the file's place; so does an empty file behind `fd`,
 * which keeps no mount busy, and in which the VMM may punch holes as it gives pages back. Once a process: a second
 * time it fails with EBUSY. Failing, it says why on standard error.
 */
void *imagefs_preload_pager_map(void *address, size_t length, int protection, int flags, int fd, off_t offset);

#endif
