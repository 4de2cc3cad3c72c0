#include "pages.h"

#include <string.h>

/* One look per 256 bytes: few enough branches for the vectoriser, and a page that is in use ends the scan at once. */
#define BLOCK_WORDS 32

static int page_is_zero(const uint8_t *page)
{
    for (size_t at = 0; at < IMAGEFS_PAGE_SIZE; at += BLOCK_WORDS * sizeof(uint64_t)) {
        uint64_t words[BLOCK_WORDS];
        uint64_t any = 0;

        memcpy(words, page + at, sizeof words);
        for (size_t i = 0; i < BLOCK_WORDS; i++)
            any |= words[i];
        if (any)
            return 0;
    }
    return 1;
}

size_t imagefs_scan(const uint8_t *buf, size_t pages, uint8_t *bitmap)
{
    size_t used = 0;

    memset(bitmap, 0, (pages + 7) / 8);
    for (size_t i = 0; i < pages; i++) {
        if (!page_is_zero(buf + i * IMAGEFS_PAGE_SIZE)) {
            bitmap[i >> 3] |= (uint8_t)(1u << (i & 7));
            used++;
        }
    }
    return used;
}

static int bit(const uint8_t *bitmap, size_t i)
{
    return bitmap[i >> 3] >> (i & 7) & 1;
}

/* The first page after `start` whose bit differs from the bit of `start`, or `pages`. Requires start < pages. */
static size_t run_end(const uint8_t *bitmap, size_t start, size_t pages)
{
    int set = bit(bitmap, start);
    uint8_t same = set ? 0xff : 0x00;
    size_t end = start + 1;

    while (end < pages) {
        if ((end & 7) == 0 && pages - end >= 8 && bitmap[end >> 3] == same)
            end += 8;
        else if (bit(bitmap, end) == set)
            end++;
        else
            break;
    }
    return end;
}

size_t imagefs_compact(const uint8_t *buf, size_t pages, const uint8_t *bitmap, uint8_t *out)
{
    size_t written = 0;

    for (size_t start = 0, end; start < pages; start = end) {
        end = run_end(bitmap, start, pages);
        if (bit(bitmap, start)) {
            size_t bytes = (end - start) * IMAGEFS_PAGE_SIZE;

            memcpy(out + written, buf + start * IMAGEFS_PAGE_SIZE, bytes);
            written += bytes;
        }
    }
    return written;
}

size_t imagefs_expand(const uint8_t *in, size_t pages, const uint8_t *bitmap, uint8_t *out)
{
    size_t taken = 0;

    for (size_t start = 0, end; start < pages; start = end) {
        size_t bytes;

        end = run_end(bitmap, start, pages);
        bytes = (end - start) * IMAGEFS_PAGE_SIZE;
        if (bit(bitmap, start)) {
            memcpy(out + start * IMAGEFS_PAGE_SIZE, in + taken, bytes);
            taken += bytes;
        } else {
            memset(out + start * IMAGEFS_PAGE_SIZE, 0, bytes);
        }
    }
    return taken;
}

/* The bits of byte `index` that lie in first .. last (both included). Requires first >> 3 <= index <= last >> 3. */
static uint8_t mask_of(uint64_t index, uint64_t first, uint64_t last)
{
    unsigned mask = 0xff;

    if (index == first >> 3)
        mask &= 0xffu << (first & 7);
    if (index == last >> 3)
        mask &= 0xffu >> (7 - (last & 7));
    return (uint8_t)mask;
}

void imagefs_bits_set(uint8_t *bits, uint64_t first, uint64_t count)
{
    uint64_t last = first + count - 1;

    if (count == 0)
        return;
    /* An OR also for whole bytes, never a store of 0xff: a read-modify-write continues the release sequence of
     * whoever set the byte's other bits before, so that a reader synchronises with all of them. */
    for (uint64_t i = first >> 3; i <= last >> 3; i++)
        __atomic_fetch_or(&bits[i], mask_of(i, first, last), __ATOMIC_RELEASE);
}

int imagefs_bits_all(const uint8_t *bits, uint64_t first, uint64_t count)
{
    uint64_t last = first + count - 1;

    if (count == 0)
        return 1;
    for (uint64_t i = first >> 3; i <= last >> 3; i++) {
        uint8_t mask = mask_of(i, first, last);

        if ((__atomic_load_n(&bits[i], __ATOMIC_ACQUIRE) & mask) != mask)
            return 0;
    }
    return 1;
}

uint64_t imagefs_bits_count(const uint8_t *bits, uint64_t first, uint64_t count)
{
    uint64_t last = first + count - 1;
    uint64_t set = 0;

    if (count == 0)
        return 0;
    for (uint64_t i = first >> 3; i <= last >> 3; i++)
        set += (uint64_t)__builtin_popcount(__atomic_load_n(&bits[i], __ATOMIC_RELAXED) & mask_of(i, first, last));
    return set;
}

uint64_t imagefs_bits_run(const uint8_t *bits, uint64_t first, uint64_t stop, int set)
{
    uint8_t same = set ? 0xff : 0x00;

    while (first < stop) {
        /* The bits from `first` on that differ, the lowest first. */
        uint8_t differ = (uint8_t)(__atomic_load_n(&bits[first >> 3], __ATOMIC_ACQUIRE) ^ same) >> (first & 7);

        if (differ) {
            first += (uint64_t)__builtin_ctz(differ);
            break;
        }
        first = (first | 7) + 1;
    }
    return first < stop ? first : stop;
}
