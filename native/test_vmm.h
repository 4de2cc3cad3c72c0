/*
 * The VMM of the pager's driver (test_pager.c), in a process of its own: it checks every byte that it reads, and ends with
 * status 1 at the first wrong one.
 */
#ifndef IMAGEFS_TEST_VMM_H
#define IMAGEFS_TEST_VMM_H

#include "pager.h"

#include <stdio.h>
#include <sys/types.h>
#include <unistd.h>

#define CHECK(what)                                                                                    \
    do {                                                                                               \
        if (!(what)) {                                                                                 \
            fprintf(stderr, "%s:%d: not true: %s (errno %d)\n", __FILE__, __LINE__, #what, errno);     \
            _exit(1);                                                                                  \
        }                                                                                              \
    } while (0)

#define PAGE 4096u
#define HUGE_PAGE (512 * PAGE)
#define PAGES 4096u /* 16 MiB, in two regions */

enum vmm_kind {
    VMM_TOUCHES, /* threads read, write and give back pages at random */
    VMM_HUGE,    /* the same, the upper region on hugetlbfs */
    VMM_EVENTS,  /* one mremap, munmap, madvise, fork and write protection, in order */
    VMM_FORKS    /* a child touches what is missing, while its parent waits for the other end */
};

uint64_t test_random(uint64_t *state);
/* Word i of a page of the image. */
uint64_t test_word(uint64_t page, unsigned i);

/*
 * A VMM that waits for a byte on the other end of *through, *uffd and regions (2 of them) being handed over. It never
 * closes its own userfaultfd. It says "c" there for a forked child that has got a page. The caller's to close and reap.
 */
pid_t test_vmm_begin(enum vmm_kind kind, uint64_t seed, unsigned touches, int *through, int *uffd,
                     struct imagefs_pager_region *regions);

#endif
