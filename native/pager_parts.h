/*
 * What the files of the pager share. Nobody else includes this; the contract is pager.h, the actors and invariants
 * are in docs/pager.md.
 *
 * The one lock that matters, `changes`: whoever reads the userfaultfd holds it exclusively from before the read until
 * the message is in the shared state; whoever installs holds it shared from looking at the state until after the ioctl.
 * A VMM that gives a page back goes on as soon as its message is read; without the lock an install decided on before
 * would put the old content back.
 */
#ifndef IMAGEFS_PAGER_PARTS_H
#define IMAGEFS_PAGER_PARTS_H

#include "pager.h"

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/types.h>

#define PAGE 4096u
#define NO_PAGE UINT64_MAX
#define PAGER_MESSAGES 16
#define PAGER_TOUCHES (1u << 16)
#define PAGER_CHILDREN 64

/* ---- shared state (pager_state.c): only plain data, the same in every process ---- */

struct pager_range {
    uint64_t start; /* in the VMM */
    uint64_t size;
    uint64_t page; /* of `memory`, behind `start` */
    uint64_t page_size;
};

struct pager_table {
    uint64_t serial; /* of the last message that is in it */
    uint64_t count;
    struct pager_range at[IMAGEFS_PAGER_RANGES];
};

struct pager_touch {
    double seconds;
    uint64_t page;
};

struct pager_state {
    uint64_t magic; /* written last, with release order */
    uint64_t pages;
    uint64_t began; /* CLOCK_MONOTONIC, nanoseconds */
    struct imagefs_pager_statistics counters;
    /*
     * The kernel writes messages straight into `messages`: one that was read is here even if its reader was killed
     * before it returned from read(2). An event of 0 is no message. Message i has the serial number base + i.
     */
    struct {
        uint64_t base;
        uint64_t applied; /* messages that are in the rest of the state */
        struct uffd_msg messages[PAGER_MESSAGES];
    } journal;
    uint32_t active; /* which table counts; the other may be half written */
    struct pager_table tables[2];
    uint64_t touches;        /* noted, ever */
    uint64_t touches_handed; /* to `.imagefs/trace` */
    struct pager_touch touch[PAGER_TOUCHES];
    /* Then the bitmaps, (pages + 7) / 8 bytes each: answered, touched. */
};

/*
 * answered: installed, or given back by the VMM. It is never cleared: a touch of such a page finds it missing only if
 * the VMM has given it back (MADV_FREE takes it long after its message), so that zeros are right.
 */
uint8_t *pager_answered(struct pager_state *state);
uint8_t *pager_touched(struct pager_state *state);

/* Begin, or take over. The ranges are those of `options`. Returns 0, 1 for a takeover, or -1 with a line in why. */
int pager_state_open(struct pager_state *state, const struct imagefs_pager_options *options, char *why, size_t size);

const struct pager_range *pager_range_of_address(const struct pager_state *state, uint64_t address);
const struct pager_range *pager_range_of_page(const struct pager_state *state, uint64_t page);
/* These change the table; `serial` is the message's. -1 when it is full. */
int pager_table_remap(struct pager_state *state, uint64_t serial, uint64_t from, uint64_t to, uint64_t size);
int pager_table_unmap(struct pager_state *state, uint64_t serial, uint64_t start, uint64_t end);
/* Pages of [start, end) are answered from now on. Returns how many pages of `memory` lie there. */
uint64_t pager_state_remove(struct pager_state *state, uint64_t start, uint64_t end);
void pager_touch(struct pager_state *state, uint64_t page);

#define COUNT(pager, counter, amount) \
    __atomic_fetch_add(&(pager)->state->counters.counter, (uint64_t)(amount), __ATOMIC_RELAXED)

/* ---- the pager ---- */

/* A touch in hand. The address is where its thread waits, which need not be where the page is by now. */
struct pager_fault {
    uint64_t address;
    uint64_t page;
    struct pager_fault *next;
};

struct imagefs_pager {
    struct imagefs_pager_options options; /* file descriptors are ours; `order` too; `regions` is not kept */
    struct pager_state *state;
    size_t state_size;
    const uint8_t *present; /* mapping of the presence bitmap, or NULL */
    size_t present_size;
    uint8_t *zeros; /* 2 MiB of them, for pages that UFFDIO_ZEROPAGE does not know */
    int wake_fd;    /* readable once the pager ends: event threads poll it */
    int ended_fd;
    int status;     /* enum imagefs_pager_status, atomic */
    uint64_t hint;  /* page touched last plus one, for the background installer; atomic */
    uint64_t in_hand; /* touches read and not yet answered or queued; atomic */
    pthread_rwlock_t changes;

    pthread_mutex_t lock; /* of all below */
    pthread_cond_t work;  /* for fetchers */
    pthread_cond_t left;  /* a thread has ended */
    unsigned threads;
    int disowned; /* destroyed: the last thread frees */
    struct imagefs_pager_failure failure; /* valid once status is FAILED */
    struct pager_fault *queue, **queue_end;
    struct pager_fault *fetching;
    int children[PAGER_CHILDREN]; /* userfaultfds of forked VMMs, held open; under `changes`, exclusively */
    unsigned child_count;
};

/* pager.c */
int pager_running(struct imagefs_pager *pager);
void pager_end(struct imagefs_pager *pager, int status);
void pager_fail(struct imagefs_pager *pager, int error, uint64_t page, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
void pager_fail_reading(struct imagefs_pager *pager, int error, uint64_t page);

/* pager_install.c: each takes `changes` shared, and ends the pager where no other answer is left. */
enum pager_result {
    PAGER_DONE,
    PAGER_AGAIN, /* an event is pending: read it, then try again */
    PAGER_ENDED  /* the pager has ended */
};
/*
 * Install what is not yet answered of pages page .. page + count - 1. data: count * 4096 bytes, or NULL for zeros.
 * Runs are cut to what is mapped, and to whole pages of 2 MiB where the range has such.
 */
enum pager_result pager_install(struct imagefs_pager *pager, uint64_t page, uint64_t count, const uint8_t *data);
/* The same for a touch: a page that was answered before gets zeros, and whoever waits at the address is woken. */
enum pager_result pager_answer(struct imagefs_pager *pager, const struct pager_fault *fault, uint64_t count,
                               const uint8_t *data);
void pager_wake(struct imagefs_pager *pager, uint64_t address, uint64_t size);
enum pager_result pager_unprotect(struct imagefs_pager *pager, uint64_t address);
/*
 * If all that is mapped is answered, and no forked VMM waits for what it lacks: let the kernel serve it, which has zeros
 * for what was given back, and end. Returns whether the pager has ended; if not, it may be so later.
 */
int pager_complete(struct imagefs_pager *pager);
/* Pages of one installation at `page`, 1 or 512; the first of them into *first. 0 if the page is not mapped now. */
uint64_t pager_unit(struct imagefs_pager *pager, uint64_t page, uint64_t *first);

/* pager_source.c */
int pager_is_present(const struct imagefs_pager *pager, uint64_t page, uint64_t count);
/* Read from the cache, if all of it is there. 0: read. EAGAIN: it would block, and `wait` is 0. ENOENT: elsewhere. */
int pager_read_cache(const struct imagefs_pager *pager, uint64_t page, uint64_t count, uint8_t *out, int wait);
/* Read from the mount, waiting. 0, or an errno; ENODATA where `memory` ends too early. */
int pager_read_memory(const struct imagefs_pager *pager, uint64_t page, uint64_t count, uint8_t *out);
/* What the cache file has at `page`: returns 1 for data, 0 for a hole (zeros); *end: the page where that changes. */
int pager_cache_extent(const struct imagefs_pager *pager, uint64_t page, uint64_t *end);

/* pager_events.c, pager_fetch.c, pager_ahead.c, pager_trace.c: threads; their argument is the pager. */
void *pager_events(void *pager);
/* How many forked VMMs live; lets go of the others. Requires: `changes` held exclusively. */
unsigned pager_children(struct imagefs_pager *pager);
/* Apply what a dead pager had read. */
void pager_replay(struct imagefs_pager *pager);
void *pager_fetcher(void *pager);
/* Takes no ownership. A touch that is queued already is not queued again. Returns 0 or ENOMEM. */
int pager_queue(struct imagefs_pager *pager, const struct pager_fault *fault);
void *pager_ahead(void *pager);
void *pager_tracer(void *pager);

#endif
