#include "chunks.h"

#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "blake3.h"
#include "pages.h"

struct imagefs_decoder {
    size_t window_pages;
    ZSTD_DCtx *context;
    uint8_t *content; /* of a chunk that has not all of its window's pages */
    uint8_t *digests;
};

struct imagefs_decoder *imagefs_decoder_new(size_t window_pages)
{
    struct imagefs_decoder *decoder = calloc(1, sizeof *decoder);

    if (!decoder)
        return NULL;
    decoder->window_pages = window_pages;
    decoder->context = ZSTD_createDCtx();
    decoder->content = malloc(window_pages * IMAGEFS_PAGE_SIZE);
    decoder->digests = malloc(window_pages * IMAGEFS_DIGEST_SIZE);
    if (!decoder->context || !decoder->content || !decoder->digests) {
        imagefs_decoder_free(decoder);
        return NULL;
    }
    return decoder;
}

void imagefs_decoder_free(struct imagefs_decoder *decoder)
{
    if (!decoder)
        return;
    ZSTD_freeDCtx(decoder->context);
    free(decoder->content);
    free(decoder->digests);
    free(decoder);
}

/* Exactly `size` bytes of the frame's content, or 0. What follows the frame does not matter. */
static int decompress(ZSTD_DCtx *context, const uint8_t *payload, size_t payload_size, uint8_t *content, size_t size)
{
    size_t frame;

    if (ZSTD_getFrameContentSize(payload, payload_size) != size)
        return 0;
    frame = ZSTD_findFrameCompressedSize(payload, payload_size);
    return !ZSTD_isError(frame) && ZSTD_decompressDCtx(context, content, size, payload, frame) == size;
}

static int is_right(struct imagefs_decoder *decoder, const uint8_t *content, size_t pages, const uint8_t *digest)
{
    uint8_t found[IMAGEFS_DIGEST_SIZE];

    imagefs_blake3_pages(content, pages, decoder->digests);
    imagefs_blake3(decoder->digests, pages * IMAGEFS_DIGEST_SIZE, found);
    return memcmp(found, digest, sizeof found) == 0;
}

size_t imagefs_decode(struct imagefs_decoder *decoder, const uint8_t *data, struct imagefs_chunk *chunks, size_t count,
                      const uint8_t *bitmaps, uint8_t *out)
{
    size_t wrong = 0;

    for (size_t i = 0; i < count; i++) {
        struct imagefs_chunk *chunk = &chunks[i];
        const uint8_t *bitmap = bitmaps + i * (decoder->window_pages / 8);
        uint8_t *window = out + i * decoder->window_pages * IMAGEFS_PAGE_SIZE;
        size_t pages = (size_t)imagefs_bits_count(bitmap, 0, decoder->window_pages);
        int full = pages == decoder->window_pages;
        uint8_t *content = full ? window : decoder->content;

        chunk->wrong = !decompress(decoder->context, data + chunk->offset, chunk->size, content,
                                   pages * IMAGEFS_PAGE_SIZE) ||
                       !is_right(decoder, content, pages, chunk->digest);
        if (!chunk->wrong && !full)
            imagefs_expand(content, decoder->window_pages, bitmap, window);
        wrong += chunk->wrong;
    }
    return wrong;
}
