/*
 * Driver for sanitizer builds of regions.c (tests/native/test_sanitized.py): random sets of ranges against one flag
 * for every address. Argument: the seed.
 */
#include "regions.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what)                                                                 \
    do {                                                                            \
        if (!(what)) {                                                              \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #what);    \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

/* So few addresses that the set never fills: ranges do not overlap, and there are at most 40 with a gap between. */
#define ADDRESSES 80

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void check_content(const struct imagefs_regions *set, const uint8_t *flags, uintptr_t from, uintptr_t to)
{
    uintptr_t at = from;
    struct imagefs_region part;

    while (at < to && imagefs_regions_next(set, at, to, &part)) {
        CHECK(at <= part.start && part.start < part.end && part.end <= to);
        for (; at < part.start; at++)
            CHECK(!flags[at]);
        for (; at < part.end; at++)
            CHECK(flags[at]);
    }
    for (; at < to; at++)
        CHECK(!flags[at]);
}

static void check_random(uint64_t *state)
{
    struct imagefs_regions set = {0};
    uint8_t flags[ADDRESSES] = {0};

    for (int step = 0; step < 3000; step++) {
        uintptr_t start = next_random(state) % (ADDRESSES - 1);
        uintptr_t end = start + 1 + next_random(state) % 9;
        int add = next_random(state) & 1;

        end = end < ADDRESSES ? end : ADDRESSES;
        if (add)
            CHECK(imagefs_regions_add(&set, start, end) == 0);
        else
            imagefs_regions_remove(&set, start, end);
        memset(flags + start, add, end - start);
        check_content(&set, flags, 0, ADDRESSES);
        check_content(&set, flags, start, end);
        if (next_random(state) % 100 == 0) {
            imagefs_regions_remove(&set, 0, ADDRESSES);
            CHECK(set.count == 0);
            memset(flags, 0, sizeof flags);
        }
    }
}

static void check_full(void)
{
    struct imagefs_regions set = {0};
    struct imagefs_region part;

    for (uintptr_t i = 0; i < IMAGEFS_REGIONS_MAX; i++)
        CHECK(imagefs_regions_add(&set, i * 10, i * 10 + 6) == 0);
    CHECK(imagefs_regions_add(&set, 7, 8) == -1);
    CHECK(!imagefs_regions_next(&set, 7, 8, &part));
    /* In place of another there is room. */
    CHECK(imagefs_regions_add(&set, 10, 16) == 0);
    /* A cut in two: the upper part finds no room. */
    imagefs_regions_remove(&set, 2, 3);
    CHECK(imagefs_regions_next(&set, 0, 10, &part) && part.start == 0 && part.end == 2);
    CHECK(!imagefs_regions_next(&set, 2, 10, &part));
    CHECK(set.count == IMAGEFS_REGIONS_MAX);
}

static void check_ends(void)
{
    struct imagefs_regions set = {0};
    struct imagefs_region part;

    CHECK(!imagefs_regions_next(&set, 0, UINTPTR_MAX, &part));
    CHECK(imagefs_regions_add(&set, 1, UINTPTR_MAX) == 0);
    CHECK(imagefs_regions_next(&set, UINTPTR_MAX - 1, UINTPTR_MAX, &part) && part.start == UINTPTR_MAX - 1);
    CHECK(!imagefs_regions_next(&set, 0, 1, &part));
}

int main(int argc, char **argv)
{
    uint64_t state;

    CHECK(argc == 2);
    state = strtoull(argv[1], NULL, 10) | 1;
    check_random(&state);
    check_full();
    check_ends();
    puts("regions: all true");
    return 0;
}
