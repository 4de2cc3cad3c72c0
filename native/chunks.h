/*
 * Chunks into windows: decompressed, verified and spread over their pages, many in one call.
 *
 * What a chunk is: imagefs/image/chunks.py. A window is `window_pages` pages, of which bit i (least significant first)
 * of its bitmap says whether page i is in the chunk; the others are zero.
 */
#ifndef IMAGEFS_CHUNKS_H
#define IMAGEFS_CHUNKS_H

#include <stddef.h>
#include <stdint.h>

/* What stands between these two marks is what Python sees (native/build.py). */
/* cdef begin */

/* One chunk of a call. Everything but `wrong` is filled in by the caller. */
struct imagefs_chunk {
    uint64_t offset;     /* of its payload in `data` */
    uint64_t size;       /* of its payload, bytes; offset + size is within `data` */
    uint8_t digest[32];  /* BLAKE3 of the digests of its pages */
    uint8_t wrong;       /* written: 0 if its window is in `out`, else 1: not these bytes */
};

/* What decompressing needs beside its input; for one thread at a time. NULL where there is no memory. */
struct imagefs_decoder;
struct imagefs_decoder *imagefs_decoder_new(size_t window_pages);
void imagefs_decoder_free(struct imagefs_decoder *decoder);

/*
 * Make the windows of `count` chunks. data: their payloads. bitmaps: window_pages / 8 bytes a chunk (window_pages is a
 * multiple of 8), at least one bit set. out: window_pages * 4096 bytes a chunk; what is there of a chunk that is wrong
 * is no page of it. Nothing overlaps. Returns how many are wrong.
 */
size_t imagefs_decode(struct imagefs_decoder *decoder, const uint8_t *data, struct imagefs_chunk *chunks, size_t count,
                      const uint8_t *bitmaps, uint8_t *out);

/* cdef end */

#endif
