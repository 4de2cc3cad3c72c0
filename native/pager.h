/*
 * The fault helper: fills memory that a VMM has registered with userfaultfd(2), on touch and ahead of touches.
 *
 * Who calls. The process that serves, which need not be the VMM's. The VMM (or its shim) made the userfaultfd, told
 * the kernel which events it wants, registered its regions in MISSING mode, and handed a copy over.
 *
 * Where pages come from. `memory`, the mount's flat file, whose reads block until the page has arrived; or, without
 * leaving the kernel, the cache's sparse page file, for pages whose presence bit is set (imagefs/cache/disk.py).
 *
 * What is promised. A touch is answered with the image's page, or with zeros if the VMM gave the page back before
 * (madvise, balloon), or it waits. If the right page cannot be had, the pager ends with a failure that names page and
 * error, touches go on waiting, and the owner stops the VMM.
 *
 * State. All that must outlive this process is in a shared file of the owner's (a memfd that a supervisor keeps, too).
 * Creating a pager on a state that is in use takes over from a pager that died: the owner makes sure that it is dead.
 * The owner also keeps a copy of the userfaultfd: when the last one is closed, missing pages read as zeros.
 *
 * Ownership. imagefs_pager_create duplicates all file descriptors and copies all arrays; the caller keeps its own.
 * Threads. All functions may be called from any thread; stop and destroy once, by the owner. Nothing here touches
 * registered memory, and nothing needs the GIL.
 */
#ifndef IMAGEFS_PAGER_H
#define IMAGEFS_PAGER_H

#include <stddef.h>
#include <stdint.h>

/* What stands between these two marks is what Python sees (native/build.py). */
/* cdef begin */

/* Regions, and pieces into which mremap and munmap may cut them. */
#define IMAGEFS_PAGER_RANGES 64

struct imagefs_pager_region {
    uint64_t address;   /* in the VMM, a multiple of page_size */
    uint64_t size;      /* bytes, a multiple of page_size */
    uint64_t offset;    /* of its first byte in `memory`, a multiple of 4096 */
    uint64_t page_size; /* 4096, or 2097152 for hugetlb (transparent huge pages are 4096) */
};

/* Pages of `memory`, of 4096 bytes. */
struct imagefs_pager_run {
    uint64_t page;
    uint64_t count;
};

struct imagefs_pager_options {
    int uffd;        /* made non-blocking by create */
    int state_fd;    /* imagefs_pager_state_size bytes, shared; all zeros: begin, otherwise: take over */
    int memory_fd;   /* `memory` of the mount */
    int cache_fd;    /* the cache's page file, or -1 */
    int present_fd;  /* its presence bitmap, or -1 (both or none) */
    int arrivals_fd; /* `.imagefs/arrivals`, or -1 */
    int trace_fd;    /* `.imagefs/trace`, open for writing, or -1 */
    uint32_t event_threads; /* answer from the cache; 0: default */
    uint32_t fetch_threads; /* block in reads of `memory`; 0: default */
    uint32_t window_pages;  /* fetched and installed around a touch; 0: default; a power of two */
    uint32_t batch_pages;   /* installed ahead at a time, which is what a touch may have to wait for; 0: default */
    uint32_t ahead;         /* whether to install what is here ahead of touches */
    int failure_signal;     /* ends this process when the pager fails, after a line on standard error: for a process
                               that pages itself, and whose other threads may wait for ever. 0: none */
    uint64_t pages;         /* of `memory` */
    const struct imagefs_pager_region *regions; /* ignored when taking over: the state knows where they are now */
    size_t region_count;
    const struct imagefs_pager_run *order; /* what to install first, in order: a working set. May be NULL */
    size_t order_count;
};

/* Counters, over all pagers that have worked on a state. Pages are of 4096 bytes. */
struct imagefs_pager_statistics {
    uint64_t faults;        /* messages of touches */
    uint64_t from_cache;    /* touches answered from the cache at once */
    uint64_t from_memory;   /* touches for which `memory` was read */
    uint64_t from_nothing;  /* touches of pages given back before: answered with zeros */
    uint64_t unprotected;   /* write-protect faults */
    uint64_t copied_pages;
    uint64_t zero_pages;
    uint64_t ahead_pages;   /* of both, those that the background installer brought */
    uint64_t removed_pages; /* given back by the VMM */
    uint64_t remaps;
    uint64_t unmaps;
    uint64_t forks;
    uint64_t existed;       /* pages that somebody else had installed */
    uint64_t vanished;      /* installs into ranges that had just gone */
    uint64_t again;         /* installs put off because an event was pending */
    uint64_t takeovers;
    uint64_t touched;       /* first touches noted */
    uint64_t trace_dropped; /* first touches for which the trace had no room */
};

enum imagefs_pager_status {
    IMAGEFS_PAGER_RUNNING,
    IMAGEFS_PAGER_STOPPED,  /* by its owner */
    IMAGEFS_PAGER_VMM_GONE,
    IMAGEFS_PAGER_FAILED,   /* the owner must stop the VMM, or begin a new one if `memory` can be read again */
    IMAGEFS_PAGER_COMPLETE  /* all pages were answered, and the regions are no longer registered */
};

struct imagefs_pager_failure {
    int32_t error; /* errno, or 0 */
    uint32_t reading; /* whether it was a read of `memory`, which may succeed later */
    uint64_t page; /* of `memory`; all bits set if the failure has none */
    char text[192];
};

struct imagefs_pager;

/* Bytes of the shared state of an image of that many pages; 0 for more pages than 2^40. */
size_t imagefs_pager_state_size(uint64_t pages);

/* Whether a VMM may have such regions over a `memory` of that many pages. Returns 0, or -1 with a line in why. */
int imagefs_pager_check_regions(const struct imagefs_pager_region *regions, size_t count, uint64_t pages, char *why,
                                size_t why_size);

/*
 * A pager, not yet serving. NULL on failure, with a line in `why` (of why_size bytes, may be 0): nothing is changed
 * then, but that the userfaultfd may have become non-blocking.
 */
struct imagefs_pager *imagefs_pager_create(const struct imagefs_pager_options *options, char *why, size_t why_size);

/* Let its threads go, if the owner has not stopped it; wait up to `milliseconds` for them; free it.
 * Returns 1, or 0 if a thread is still in a read that the mount does not answer: that thread keeps what it needs,
 * installs nothing when the read returns, and the last one to leave frees the rest. The pager is gone for the caller
 * either way. NULL is 1. */
int imagefs_pager_destroy(struct imagefs_pager *pager, int milliseconds);

/* Serve. Once. Returns 0, or an errno if threads cannot be had: then destroy it. */
int imagefs_pager_start(struct imagefs_pager *pager);

/* Serve no more; returns at once. Touches wait from now on. */
void imagefs_pager_stop(struct imagefs_pager *pager);

/* An eventfd, the pager's own, that is readable once the status is no longer RUNNING. */
int imagefs_pager_ended_fd(const struct imagefs_pager *pager);

enum imagefs_pager_status imagefs_pager_get_status(struct imagefs_pager *pager);
void imagefs_pager_get_statistics(struct imagefs_pager *pager, struct imagefs_pager_statistics *out);

/* Why it failed. Returns 1, or 0 if it has not: *out is then left alone. */
int imagefs_pager_get_failure(struct imagefs_pager *pager, struct imagefs_pager_failure *out);

/* The counters in a state, for its other owner. Returns 1, or 0 if no pager has begun on it. */
int imagefs_pager_state_statistics(int state_fd, struct imagefs_pager_statistics *out);

/* cdef end */

#endif
