/*
 * BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs) of what imagefs digests: single pages, many at a time, and short
 * lists of digests. Unkeyed, 32 bytes. Several pages are hashed side by side in the lanes of a vector; a library that is
 * given one page at a time has only that page's four chunks to fill them with.
 *
 * Nothing is kept, allocated or freed; all functions may be called from any thread.
 */
#ifndef IMAGEFS_BLAKE3_H
#define IMAGEFS_BLAKE3_H

#include <stddef.h>
#include <stdint.h>

/* What stands between these two marks is what Python sees (native/build.py). */
/* cdef begin */

#define IMAGEFS_DIGEST_SIZE 32

/* The digests of `count` pages, end to end. pages: count * 4096 bytes. out: count * 32 bytes; no overlap. */
void imagefs_blake3_pages(const uint8_t *pages, size_t count, uint8_t *out);

/* The digest of `size` bytes. out: 32 bytes; no overlap. One chunk after the other: for short inputs. */
void imagefs_blake3(const uint8_t *in, size_t size, uint8_t *out);

/* cdef end */

#endif
