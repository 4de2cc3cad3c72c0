#include "regions.h"

int imagefs_regions_add(struct imagefs_regions *set, uintptr_t start, uintptr_t end)
{
    imagefs_regions_remove(set, start, end);
    if (set->count == IMAGEFS_REGIONS_MAX)
        return -1;
    set->at[set->count++] = (struct imagefs_region){start, end};
    return 0;
}

void imagefs_regions_remove(struct imagefs_regions *set, uintptr_t start, uintptr_t end)
{
    /* Downwards: what is appended is outside the range, and what takes a removed entry's place was looked at. */
    for (size_t i = set->count; i-- > 0;) {
        struct imagefs_region *region = &set->at[i];
        struct imagefs_region above = {end, region->end};

        if (region->end <= start || end <= region->start)
            continue;
        if (region->start < start) {
            region->end = start;
            if (above.start < above.end && set->count < IMAGEFS_REGIONS_MAX)
                set->at[set->count++] = above;
        } else if (above.start < above.end) {
            *region = above;
        } else {
            *region = set->at[--set->count];
        }
    }
}

int imagefs_regions_next(const struct imagefs_regions *set, uintptr_t start, uintptr_t end,
                         struct imagefs_region *found)
{
    const struct imagefs_region *lowest = NULL;

    for (size_t i = 0; i < set->count; i++) {
        const struct imagefs_region *region = &set->at[i];

        if (region->end <= start || end <= region->start)
            continue;
        if (!lowest || region->start < lowest->start)
            lowest = region;
    }
    if (!lowest)
        return 0;
    found->start = lowest->start > start ? lowest->start : start;
    found->end = lowest->end < end ? lowest->end : end;
    return 1;
}
