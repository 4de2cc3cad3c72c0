#include "blake3.h"

#include <string.h>

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };
enum { BLOCK = 64, CHUNK = 1024, PAGE = 4096, LANES = 8, GROUP = 4 };

static const uint32_t IV[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                               0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

/* The message words of each round: section 2.2, the permutation applied once more each time. */
static const uint8_t ORDER[7][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1}, {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4}, {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13},
};

/* The compression function, for one word a variable and for a vector of them: T is uint32_t or lanes. */
#define ROTATE(x, n) (((x) >> (n)) | ((x) << (32 - (n))))
#define MIX(a, b, c, d, x, y)                                                                                           \
    do {                                                                                                               \
        v[a] += v[b] + (x);                                                                                            \
        v[d] = ROTATE(v[d] ^ v[a], 16);                                                                                \
        v[c] += v[d];                                                                                                  \
        v[b] = ROTATE(v[b] ^ v[c], 12);                                                                                \
        v[a] += v[b] + (y);                                                                                            \
        v[d] = ROTATE(v[d] ^ v[a], 8);                                                                                 \
        v[c] += v[d];                                                                                                  \
        v[b] = ROTATE(v[b] ^ v[c], 7);                                                                                 \
    } while (0)
#define COMPRESS(T, name)                                                                                               \
    static inline __attribute__((always_inline)) void name(T *cv, const T *m, const T *counter, uint32_t size,     \
                                                             uint32_t flags)                                           \
    {                                                                                                                  \
        const T none = {0};                                                                                            \
        T v[16];                                                                                                       \
                                                                                                                       \
        for (int i = 0; i < 8; i++)                                                                                    \
            v[i] = cv[i];                                                                                              \
        for (int i = 0; i < 4; i++)                                                                                    \
            v[8 + i] = none + IV[i];                                                                                   \
        v[12] = *counter;                                                                                              \
        v[13] = none; /* no input here is long enough for a counter of more than 32 bits */                            \
        v[14] = none + size;                                                                                           \
        v[15] = none + flags;                                                                                          \
        for (int r = 0; r < 7; r++)                                                                                    \
        {                                                                                                              \
            const uint8_t *o = ORDER[r];                                                                               \
                                                                                                                       \
            MIX(0, 4, 8, 12, m[o[0]], m[o[1]]);                                                                        \
            MIX(1, 5, 9, 13, m[o[2]], m[o[3]]);                                                                        \
            MIX(2, 6, 10, 14, m[o[4]], m[o[5]]);                                                                       \
            MIX(3, 7, 11, 15, m[o[6]], m[o[7]]);                                                                       \
            MIX(0, 5, 10, 15, m[o[8]], m[o[9]]);                                                                       \
            MIX(1, 6, 11, 12, m[o[10]], m[o[11]]);                                                                     \
            MIX(2, 7, 8, 13, m[o[12]], m[o[13]]);                                                                      \
            MIX(3, 4, 9, 14, m[o[14]], m[o[15]]);                                                                      \
        }                                                                                                              \
        for (int i = 0; i < 8; i++)                                                                                    \
            cv[i] = v[i] ^ v[8 + i];                                                                                   \
    }

typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));

COMPRESS(uint32_t, compress_one)
COMPRESS(lanes, compress_lanes)

static void store_words(uint8_t *out, const uint32_t *words)
{
    for (int i = 0; i < 8; i++)
        for (int byte = 0; byte < 4; byte++)
            out[4 * i + byte] = (uint8_t)(words[i] >> 8 * byte);
}

/* --- one input ------------------------------------------------------------------------------------------------- */

static void chunk_cv(const uint8_t *in, size_t size, uint32_t counter, uint32_t last_flags, uint32_t *cv)
{
    size_t at = 0;

    memcpy(cv, IV, sizeof IV);
    do {
        size_t left = size - at < BLOCK ? size - at : BLOCK;
        uint32_t flags = (at == 0 ? CHUNK_START : 0) | (at + left == size ? CHUNK_END | last_flags : 0);
        uint8_t block[BLOCK] = {0};
        uint32_t m[16];

        memcpy(block, in + at, left);
        for (int i = 0; i < 16; i++)
            m[i] = block[4 * i] | (uint32_t)block[4 * i + 1] << 8 | (uint32_t)block[4 * i + 2] << 16 |
                   (uint32_t)block[4 * i + 3] << 24;
        compress_one(cv, m, &counter, (uint32_t)left, flags);
        at += left;
    } while (at < size);
}

/* The chaining value of a subtree that begins at chunk `counter`. Depth: the logarithm of its chunks. */
static void subtree_cv(const uint8_t *in, size_t size, uint32_t counter, uint32_t last_flags, uint32_t *cv)
{
    const uint32_t none = 0;
    uint32_t m[16];
    size_t left = CHUNK;

    if (size <= CHUNK) {
        chunk_cv(in, size, counter, last_flags, cv);
        return;
    }
    /* To the left, as many chunks as the largest power of two leaves something for the right. */
    while (2 * left < size)
        left *= 2;
    subtree_cv(in, left, counter, 0, m);
    subtree_cv(in + left, size - left, counter + (uint32_t)(left / CHUNK), 0, m + 8);
    memcpy(cv, IV, sizeof IV);
    compress_one(cv, m, &none, BLOCK, PARENT | last_flags);
}

void imagefs_blake3(const uint8_t *in, size_t size, uint8_t *out)
{
    uint32_t cv[8];

    subtree_cv(in, size, 0, ROOT, cv);
    store_words(out, cv);
}

/* --- pages, side by side ---------------------------------------------------------------------------------------- */

/* Words 8 half .. 8 half + 7 of a block of each lane, word by word: m[i] is word i of all lanes. */
static inline __attribute__((always_inline)) void load_half(const uint8_t *const *in, size_t at, lanes *m)
{
    lanes row[LANES], pair[LANES], quad[LANES];

    for (int lane = 0; lane < LANES; lane++)
        memcpy(&row[lane], in[lane] + at, sizeof row[lane]);
    for (int i = 0; i < LANES; i += 2) {
        pair[i] = __builtin_shuffle(row[i], row[i + 1], (lanes){0, 8, 1, 9, 4, 12, 5, 13});
        pair[i + 1] = __builtin_shuffle(row[i], row[i + 1], (lanes){2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (int i = 0; i < LANES; i += 4) {
        for (int k = 0; k < 2; k++) {
            quad[i + 2 * k] = __builtin_shuffle(pair[i + k], pair[i + k + 2], (lanes){0, 1, 8, 9, 4, 5, 12, 13});
            quad[i + 2 * k + 1] = __builtin_shuffle(pair[i + k], pair[i + k + 2], (lanes){2, 3, 10, 11, 6, 7, 14, 15});
        }
    }
    for (int i = 0; i < 4; i++) {
        m[i] = __builtin_shuffle(quad[i], quad[i + 4], (lanes){0, 1, 2, 3, 8, 9, 10, 11});
        m[i + 4] = __builtin_shuffle(quad[i], quad[i + 4], (lanes){4, 5, 6, 7, 12, 13, 14, 15});
    }
}

/* The chaining values of the chunks of two pages: lane 4 p + c is chunk c of page p. */
static inline __attribute__((always_inline)) void two_pages(const uint8_t *first, const uint8_t *second, lanes *cv)
{
    const lanes counter = {0, 1, 2, 3, 0, 1, 2, 3};
    const uint8_t *in[LANES];
    lanes m[16];

    for (int lane = 0; lane < LANES; lane++)
        in[lane] = (lane < 4 ? first : second) + (size_t)(lane % 4) * CHUNK;
    for (int i = 0; i < 8; i++)
        cv[i] = (lanes){0} + IV[i];
    for (size_t at = 0; at < CHUNK; at += BLOCK) {
        load_half(in, at, m);
        load_half(in, at + BLOCK / 2, m + 8);
        compress_lanes(cv, m, &counter, BLOCK, (at == 0 ? CHUNK_START : 0) | (at == CHUNK - BLOCK ? CHUNK_END : 0));
    }
}

/* Parents of neighbours: lane i of `out` is the parent of lanes 2 i and 2 i + 1 of `left` and then of `right`. */
static inline __attribute__((always_inline)) void parents(const lanes *left, const lanes *right, uint32_t flags, lanes *out)
{
    const lanes none = {0};
    lanes m[16];

    for (int i = 0; i < 8; i++) {
        m[i] = __builtin_shuffle(left[i], right[i], (lanes){0, 2, 4, 6, 8, 10, 12, 14});
        m[8 + i] = __builtin_shuffle(left[i], right[i], (lanes){1, 3, 5, 7, 9, 11, 13, 15});
        out[i] = (lanes){0} + IV[i];
    }
    compress_lanes(out, m, &none, BLOCK, PARENT | flags);
}

static inline __attribute__((always_inline)) void all_pages(const uint8_t *pages, size_t count, uint8_t *out)
{
    for (size_t first = 0; first < count; first += GROUP) {
        size_t group = count - first < GROUP ? count - first : GROUP;
        const uint8_t *page[GROUP];
        lanes low[8], high[8], middle[8], root[8];

        /* A group that is not full hashes its last page more than once. */
        for (size_t i = 0; i < GROUP; i++)
            page[i] = pages + (first + (i < group ? i : group - 1)) * PAGE;
        two_pages(page[0], page[1], low);
        if (group > 2)
            two_pages(page[2], page[3], high);
        else
            memcpy(high, low, sizeof high);
        parents(low, high, 0, middle);
        parents(middle, middle, ROOT, root);
        for (size_t i = 0; i < group; i++) {
            uint32_t words[8];

            for (int word = 0; word < 8; word++)
                words[word] = root[word][i];
            store_words(out + (first + i) * IMAGEFS_DIGEST_SIZE, words);
        }
    }
}

/* The same for processors that have more: wider vectors, and a rotation in one instruction. */
#if defined(__x86_64__)
__attribute__((target("avx512f,avx512vl"))) static void pages_avx512(const uint8_t *in, size_t count, uint8_t *out)
{
    all_pages(in, count, out);
}

__attribute__((target("avx2"))) static void pages_avx2(const uint8_t *in, size_t count, uint8_t *out)
{
    all_pages(in, count, out);
}
#endif

void imagefs_blake3_pages(const uint8_t *pages, size_t count, uint8_t *out)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vl")) {
        pages_avx512(pages, count, out);
        return;
    }
    if (__builtin_cpu_supports("avx2")) {
        pages_avx2(pages, count, out);
        return;
    }
#endif
    all_pages(pages, count, out);
}
