/* The state that outlives a pager: ranges, answered pages, the journal of messages, first touches. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include "pages.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x31726567617069ull /* "ipager1" */
#define MOST_PAGES (1ull << 40)

static size_t bitmap_size(uint64_t pages)
{
    return (size_t)(pages + 7) / 8;
}

uint8_t *pager_answered(struct pager_state *state)
{
    return (uint8_t *)(state + 1);
}

uint8_t *pager_touched(struct pager_state *state)
{
    return pager_answered(state) + bitmap_size(state->pages);
}

size_t imagefs_pager_state_size(uint64_t pages)
{
    return pages > MOST_PAGES ? 0 : sizeof(struct pager_state) + 2 * bitmap_size(pages);
}

static uint64_t nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int overlap(uint64_t a, uint64_t b, uint64_t size_a, uint64_t size_b)
{
    return a < b + size_b && b < a + size_a;
}

int imagefs_pager_check_regions(const struct imagefs_pager_region *regions, size_t count, uint64_t pages, char *why,
                                size_t why_size)
{
    uint64_t memory = pages * PAGE;

    if (count == 0 || count > IMAGEFS_PAGER_RANGES) {
        snprintf(why, why_size, "%zu regions: between 1 and %d are understood", count, IMAGEFS_PAGER_RANGES);
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        const struct imagefs_pager_region *one = &regions[i];

        if (one->page_size != PAGE && one->page_size != 512 * PAGE) {
            snprintf(why, why_size, "region %zu: page size %llu is neither 4096 nor 2097152", i,
                     (unsigned long long)one->page_size);
            return -1;
        }
        if (one->size == 0 || one->size % one->page_size || one->address % one->page_size || one->offset % PAGE) {
            snprintf(why, why_size, "region %zu: address, size or offset is not a multiple of the page size", i);
            return -1;
        }
        if (one->address + one->size < one->address || one->size > memory || one->offset > memory - one->size) {
            snprintf(why, why_size, "region %zu: reaches beyond the memory's %llu bytes", i,
                     (unsigned long long)memory);
            return -1;
        }
        for (size_t j = 0; j < i; j++) {
            if (overlap(one->address, regions[j].address, one->size, regions[j].size) ||
                overlap(one->offset, regions[j].offset, one->size, regions[j].size)) {
                snprintf(why, why_size, "regions %zu and %zu overlap", j, i);
                return -1;
            }
        }
    }
    return 0;
}

int pager_state_open(struct pager_state *state, const struct imagefs_pager_options *options, char *why, size_t size)
{
    uint64_t magic = __atomic_load_n(&state->magic, __ATOMIC_ACQUIRE);

    if (magic == MAGIC) {
        if (state->pages != options->pages) {
            snprintf(why, size, "the state is that of %llu pages, the memory has %llu",
                     (unsigned long long)state->pages, (unsigned long long)options->pages);
            return -1;
        }
        return 1;
    }
    if (magic != 0) {
        snprintf(why, size, "the state is not that of a pager of this version");
        return -1;
    }
    if (imagefs_pager_check_regions(options->regions, options->region_count, options->pages, why, size))
        return -1;
    state->pages = options->pages;
    state->began = nanoseconds();
    state->journal.base = 1;
    state->tables[0].count = options->region_count;
    for (size_t i = 0; i < options->region_count; i++) {
        const struct imagefs_pager_region *one = &options->regions[i];

        state->tables[0].at[i] = (struct pager_range){one->address, one->size, one->offset / PAGE, one->page_size};
    }
    __atomic_store_n(&state->magic, MAGIC, __ATOMIC_RELEASE);
    return 0;
}

const struct pager_range *pager_range_of_address(const struct pager_state *state, uint64_t address)
{
    const struct pager_table *table = &state->tables[state->active];

    for (uint64_t i = 0; i < table->count; i++)
        if (address - table->at[i].start < table->at[i].size)
            return &table->at[i];
    return NULL;
}

const struct pager_range *pager_range_of_page(const struct pager_state *state, uint64_t page)
{
    const struct pager_table *table = &state->tables[state->active];

    for (uint64_t i = 0; i < table->count; i++)
        if (page - table->at[i].page < table->at[i].size / PAGE)
            return &table->at[i];
    return NULL;
}

static int table_add(struct pager_table *table, uint64_t start, uint64_t end, uint64_t page, uint64_t page_size)
{
    if (start >= end)
        return 0;
    if (table->count == IMAGEFS_PAGER_RANGES)
        return -1;
    table->at[table->count++] = (struct pager_range){start, end - start, page, page_size};
    return 0;
}

/* `next` becomes `now` without [start, end); what lies there goes to `moved` bytes further, unless that is 0. */
static int table_cut(const struct pager_table *now, struct pager_table *next, uint64_t start, uint64_t end,
                     uint64_t moved)
{
    int full = 0;

    next->count = 0;
    for (uint64_t i = 0; i < now->count; i++) {
        const struct pager_range *one = &now->at[i];
        uint64_t stop = one->start + one->size;
        uint64_t low = start > one->start ? start : one->start;
        uint64_t high = end < stop ? end : stop;

        if (low >= high) {
            full |= table_add(next, one->start, stop, one->page, one->page_size);
            continue;
        }
        full |= table_add(next, one->start, low, one->page, one->page_size);
        full |= table_add(next, high, stop, one->page + (high - one->start) / PAGE, one->page_size);
        if (moved)
            full |= table_add(next, low + moved, high + moved, one->page + (low - one->start) / PAGE, one->page_size);
    }
    return full;
}

static int table_change(struct pager_state *state, uint64_t serial, uint64_t start, uint64_t end, uint64_t moved)
{
    const struct pager_table *now = &state->tables[state->active];
    struct pager_table *next = &state->tables[!state->active];

    /* Applied already: its pager died between this and noting it in the journal. Twice would move what came after. */
    if (now->serial >= serial)
        return 0;
    if (table_cut(now, next, start, end, moved))
        return -1;
    next->serial = serial;
    __atomic_store_n(&state->active, !state->active, __ATOMIC_RELEASE);
    return 0;
}

int pager_table_remap(struct pager_state *state, uint64_t serial, uint64_t from, uint64_t to, uint64_t size)
{
    return from == to ? 0 : table_change(state, serial, from, from + size, to - from);
}

int pager_table_unmap(struct pager_state *state, uint64_t serial, uint64_t start, uint64_t end)
{
    return table_change(state, serial, start, end, 0);
}

uint64_t pager_state_remove(struct pager_state *state, uint64_t start, uint64_t end)
{
    const struct pager_table *table = &state->tables[state->active];
    uint64_t removed = 0;

    for (uint64_t i = 0; i < table->count; i++) {
        const struct pager_range *one = &table->at[i];
        uint64_t low = start > one->start ? start : one->start;
        uint64_t high = end < one->start + one->size ? end : one->start + one->size;

        if (low < high) {
            imagefs_bits_set(pager_answered(state), one->page + (low - one->start) / PAGE, (high - low) / PAGE);
            removed += (high - low) / PAGE;
        }
    }
    return removed;
}

void pager_touch(struct pager_state *state, uint64_t page)
{
    uint64_t handed = __atomic_load_n(&state->touches_handed, __ATOMIC_ACQUIRE);

    if (imagefs_bits_all(pager_touched(state), page, 1))
        return;
    imagefs_bits_set(pager_touched(state), page, 1);
    if (state->touches - handed >= PAGER_TOUCHES) {
        /* The first ones are worth the most: what does not fit is dropped. */
        __atomic_fetch_add(&state->counters.trace_dropped, 1, __ATOMIC_RELAXED);
        return;
    }
    state->touch[state->touches % PAGER_TOUCHES] =
        (struct pager_touch){(double)(nanoseconds() - state->began) / 1e9, page};
    __atomic_store_n(&state->touches, state->touches + 1, __ATOMIC_RELEASE);
    __atomic_fetch_add(&state->counters.touched, 1, __ATOMIC_RELAXED);
}

int imagefs_pager_state_statistics(int state_fd, struct imagefs_pager_statistics *out)
{
    struct pager_state *state = mmap(NULL, sizeof *state, PROT_READ, MAP_SHARED, state_fd, 0);
    int begun;

    if (state == MAP_FAILED)
        return 0;
    begun = __atomic_load_n(&state->magic, __ATOMIC_ACQUIRE) == MAGIC;
    if (begun) {
        uint64_t *to = (uint64_t *)out;
        const uint64_t *from = (const uint64_t *)&state->counters;

        for (size_t i = 0; i < sizeof *out / sizeof *to; i++)
            to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    }
    munmap(state, sizeof *state);
    return begun;
}
