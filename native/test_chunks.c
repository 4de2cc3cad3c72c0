/* Decoding under sanitizers: good chunks, and the same with every byte damaged once, and cut everywhere. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "blake3.h"
#include "chunks.h"

enum { PAGES = 8, PAGE = 4096 };

static void check(int truth, const char *what)
{
    if (!truth) {
        fprintf(stderr, "not true: %s\n", what);
        exit(1);
    }
}

static uint32_t next(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

int main(int argc, char **argv)
{
    static uint8_t content[PAGES * PAGE], window[PAGES * PAGE], digests[PAGES * 32];
    uint32_t seed = argc > 1 ? (uint32_t)strtoull(argv[1], NULL, 10) : 1;
    struct imagefs_decoder *decoder = imagefs_decoder_new(PAGES);

    check(decoder != NULL, "there is memory");
    for (unsigned bits = 1; bits < 256; bits = bits * 3 + 1) {
        struct imagefs_chunk chunk = {0};
        uint8_t bitmap = (uint8_t)bits;
        size_t pages = (size_t)__builtin_popcount(bitmap), size;
        uint8_t *payload, *exact;

        for (size_t i = 0; i < pages * PAGE; i++)
            content[i] = (uint8_t)(i % 64 ? content[i - 1] : next(&seed));
        imagefs_blake3_pages(content, pages, digests);
        imagefs_blake3(digests, pages * 32, chunk.digest);
        payload = malloc(ZSTD_compressBound(pages * PAGE));
        check(payload != NULL, "there is memory");
        size = ZSTD_compress(payload, ZSTD_compressBound(pages * PAGE), content, pages * PAGE, 3);
        /* Of exactly its size, so that reading behind it is seen. */
        exact = malloc(size);
        check(exact != NULL, "there is memory");
        memcpy(exact, payload, size);
        chunk.size = size;
        check(imagefs_decode(decoder, exact, &chunk, 1, &bitmap, window) == 0 && !chunk.wrong, "a good chunk is right");
        for (size_t page = 0, at = 0; page < PAGES; page++) {
            static const uint8_t zeros[PAGE];
            int used = bitmap >> page & 1;

            check(!memcmp(window + page * PAGE, used ? content + at : zeros, PAGE), "its pages are where they belong");
            at += used ? PAGE : 0;
        }
        for (size_t at = 0; at < size; at += 1 + size / 40) {
            exact[at] ^= (uint8_t)(1 + next(&seed) % 255);
            if (imagefs_decode(decoder, exact, &chunk, 1, &bitmap, window) == 0)
                check(!chunk.wrong, "what is right is not wrong");
            exact[at] = payload[at];
            chunk.size = at;
            check(imagefs_decode(decoder, exact, &chunk, 1, &bitmap, window) == 1 && chunk.wrong, "a part is wrong");
            chunk.size = size;
        }
        free(exact);
        free(payload);
    }
    imagefs_decoder_free(decoder);
    puts("chunks: all true");
    return 0;
}
