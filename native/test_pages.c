/*
 * Driver for sanitizer builds of pages.c (tests/native/test_sanitized.py): every buffer is a heap block of exactly
 * the promised size, so that an access outside it is seen. Argument: the seed.
 */
#define _POSIX_C_SOURCE 200809L

#include "pages.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE IMAGEFS_PAGE_SIZE
#define CHECK(what)                                                                 \
    do {                                                                            \
        if (!(what)) {                                                              \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #what);    \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint8_t *block(size_t size)
{
    uint8_t *bytes = malloc(size);

    CHECK(bytes);
    memset(bytes, 0xee, size);
    return bytes;
}

static int is_set(const uint8_t *bits, uint64_t i)
{
    return bits[i >> 3] >> (i & 7) & 1;
}

static void check_pages(uint64_t *state, size_t pages)
{
    size_t size = (pages + 7) / 8, used = 0, packed = 0;
    uint8_t *buf = block(pages * PAGE), *bitmap = block(size), *out = block(pages * PAGE), *compact;

    memset(buf, 0, pages * PAGE);
    for (size_t i = 0; i < pages; i++)
        if (next_random(state) % 3) {
            buf[i * PAGE + next_random(state) % PAGE] = 1;
            used++;
        }

    CHECK(imagefs_scan(buf, pages, bitmap) == used);
    CHECK(imagefs_bits_count(bitmap, 0, pages) == used);
    for (size_t i = 0; i < pages; i++)
        CHECK(is_set(bitmap, i) == (memchr(buf + i * PAGE, 1, PAGE) != NULL));
    for (size_t i = pages; i < size * 8; i++)
        CHECK(!is_set(bitmap, i));

    compact = block(used * PAGE);
    CHECK(imagefs_compact(buf, pages, bitmap, compact) == used * PAGE);
    for (size_t i = 0; i < pages; i++)
        if (is_set(bitmap, i))
            CHECK(memcmp(compact + packed++ * PAGE, buf + i * PAGE, PAGE) == 0);
    CHECK(imagefs_expand(compact, pages, bitmap, out) == used * PAGE);
    CHECK(memcmp(out, buf, pages * PAGE) == 0);

    free(compact);
    free(out);
    free(bitmap);
    free(buf);
}

static void check_bits(uint64_t *state, uint64_t total)
{
    uint8_t *bits = block((total + 7) / 8), *expected = block(total);

    memset(bits, 0, (total + 7) / 8);
    memset(expected, 0, total);
    for (int round = 0; round < 20; round++) {
        uint64_t first = next_random(state) % (total + 1), count = next_random(state) % (total - first + 1), set = 0;
        uint64_t run[2] = {first, first}; /* of clear, of set bits */

        for (uint64_t i = first; i < first + count; i++)
            set += expected[i];
        for (int value = 0; value < 2; value++) {
            while (run[value] < first + count && expected[run[value]] == value)
                run[value]++;
            CHECK(imagefs_bits_run(bits, first, first + count, value) == run[value]);
        }
        CHECK(imagefs_bits_count(bits, first, count) == set);
        CHECK(imagefs_bits_all(bits, first, count) == (set == count));
        imagefs_bits_set(bits, first, count);
        for (uint64_t i = first; i < first + count; i++)
            expected[i] = 1;
        CHECK(imagefs_bits_all(bits, first, count));
        for (uint64_t i = 0; i < total; i++)
            CHECK(is_set(bits, i) == expected[i]);
    }
    free(expected);
    free(bits);
}

/* Four threads publish every fourth value each, all of them look for the values of the others. */
#define THREADS 4
#define VALUES 20000

struct shared {
    uint8_t bits[VALUES / 8];
    int values[VALUES];
};

struct worker {
    pthread_t thread;
    struct shared *shared;
    int number;
};

static void *publish(void *argument)
{
    struct worker *worker = argument;
    struct shared *shared = worker->shared;

    for (int i = worker->number; i < VALUES; i += THREADS) {
        int other = i ^ 1;

        shared->values[i] = i + 1;
        imagefs_bits_set(shared->bits, (uint64_t)i, 1);
        if (imagefs_bits_all(shared->bits, (uint64_t)other, 1))
            CHECK(shared->values[other] == other + 1);
    }
    return NULL;
}

static void check_threads(void)
{
    struct shared *shared = calloc(1, sizeof *shared);
    struct worker workers[THREADS];

    CHECK(shared);
    for (int i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){.shared = shared, .number = i};
        CHECK(pthread_create(&workers[i].thread, NULL, publish, &workers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(workers[i].thread, NULL) == 0);
    CHECK(imagefs_bits_count(shared->bits, 0, VALUES) == VALUES);
    free(shared);
}

int main(int argc, char **argv)
{
    uint64_t state;

    CHECK(argc == 2);
    state = strtoull(argv[1], NULL, 10) | 1;
    for (size_t pages = 0; pages < 70; pages++)
        check_pages(&state, pages);
    for (uint64_t total = 0; total < 200; total++)
        check_bits(&state, total);
    check_threads();
    puts("pages: all true");
    return 0;
}
