/*
 * A small set of address ranges: which parts of a process's memory are mappings of the guest memory file.
 *
 * Ranges are half open, [start, end), start < end, and never overlap in a set. The set is a plain value of fixed
 * size (it is used inside mmap, where nothing may be allocated) and owns nothing. A zeroed one is empty.
 * Not safe for concurrent use: the caller holds a lock around every call.
 */
#ifndef IMAGEFS_REGIONS_H
#define IMAGEFS_REGIONS_H

#include <stddef.h>
#include <stdint.h>

/* A VMM maps guest RAM in one to about ten pieces (below and above 4 GiB, NUMA nodes, DIMMs). */
#define IMAGEFS_REGIONS_MAX 64

struct imagefs_region {
    uintptr_t start;
    uintptr_t end;
};

struct imagefs_regions {
    size_t count;
    struct imagefs_region at[IMAGEFS_REGIONS_MAX]; /* the first `count`, in no order */
};

/*
 * Add a range, in place of whatever the set holds of it. Returns 0, or -1 when the set is full: then the range is
 * not in the set, and no part of it.
 */
int imagefs_regions_add(struct imagefs_regions *set, uintptr_t start, uintptr_t end);

/*
 * Take a range out, cutting the ranges that reach over its ends. When a range falls into two and the set is full,
 * the upper part is dropped too: the set then says less than is true, never more.
 */
void imagefs_regions_remove(struct imagefs_regions *set, uintptr_t start, uintptr_t end);

/*
 * The lowest part of [start, end) that is in the set, cut to [start, end), into *found. Returns 1, or 0 when there
 * is none; *found is then left alone.
 */
int imagefs_regions_next(const struct imagefs_regions *set, uintptr_t start, uintptr_t end,
                         struct imagefs_region *found);

#endif
