/*
 * Pages and bits: what the Python parts do page by page, at the speed of memory.
 *
 * A page is IMAGEFS_PAGE_SIZE bytes. In a bitmap, page i is bit (i & 7), least significant first, of byte
 * i >> 3; a bitmap of n pages has (n + 7) / 8 bytes, and bits past the last page are ignored where read and zero
 * where written. No function keeps, allocates or frees anything: every buffer belongs to the caller, for the length
 * of the call. No buffer needs an alignment. There is no state: all functions may be called from any thread.
 *
 * Lengths are the caller's promise and are not checked here. A bitmap must not change during a call, except those
 * of the imagefs_bits functions, which threads and processes share.
 */
#ifndef IMAGEFS_PAGES_H
#define IMAGEFS_PAGES_H

#include <stddef.h>
#include <stdint.h>

/* What stands between these two marks is what Python sees (native/build.py). */
/* cdef begin */

#define IMAGEFS_PAGE_SIZE 4096

/*
 * Set bit i of `bitmap` for every page i of `buf` that holds a byte other than zero, clear it for the others.
 * buf: pages * 4096 bytes. bitmap: (pages + 7) / 8 bytes, all of them written. They do not overlap.
 * Returns how many pages are not zero.
 */
size_t imagefs_scan(const uint8_t *buf, size_t pages, uint8_t *bitmap);

/*
 * Copy the pages whose bits are set to `out`, end to end, in order.
 * buf: pages * 4096 bytes. bitmap: (pages + 7) / 8 bytes. out: 4096 bytes for every set bit; overlaps neither.
 * Returns the bytes written.
 */
size_t imagefs_compact(const uint8_t *buf, size_t pages, const uint8_t *bitmap, uint8_t *out);

/*
 * The inverse: the k-th page of `in` becomes the page of the k-th set bit in `out`; the other pages become zeros.
 * in: 4096 bytes for every set bit. bitmap: (pages + 7) / 8 bytes. out: pages * 4096 bytes; overlaps neither.
 * Returns the bytes read.
 */
size_t imagefs_expand(const uint8_t *in, size_t pages, const uint8_t *bitmap, uint8_t *out);

/*
 * Set the bits first .. first + count - 1, atomically byte by byte, leaving the others: other threads, and other
 * processes that share the mapping, may set and test bits at the same time. Who finds a bit set through
 * imagefs_bits_all also sees everything that its setter had written before (release, acquire).
 * bits: at least (first + count + 7) / 8 bytes; first + count does not overflow. A count of 0 does nothing.
 */
void imagefs_bits_set(uint8_t *bits, uint64_t first, uint64_t count);

/* 1 if all bits first .. first + count - 1 are set, otherwise 0. Bounds as above. No bits at all are all set. */
int imagefs_bits_all(const uint8_t *bits, uint64_t first, uint64_t count);

/*
 * The first of the bits first .. stop - 1 that is clear where `set` is 1, or set where it is 0; `stop` if there is none.
 * Who passes bits that are set also sees everything that their setters had written before. Bounds as above.
 */
uint64_t imagefs_bits_run(const uint8_t *bits, uint64_t first, uint64_t stop, int set);

/*
 * How many of the bits first .. first + count - 1 are set. Bounds as above. While others set bits it counts each
 * byte as of some moment during the call, and promises nothing about the data behind the bits.
 */
uint64_t imagefs_bits_count(const uint8_t *bits, uint64_t first, uint64_t count);

/* cdef end */

#endif
