/* The background installer: what is here, then what arrives, ahead of touches. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include "pages.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NICE 10
#define ZERO_BATCH 512u /* as long as a batch of data takes, or less */
#define LINES 65536u
#define LONG_PAUSE 1000 /* milliseconds between attempts to end */

struct ahead {
    struct imagefs_pager *pager;
    uint8_t *buffer; /* of a batch, at least 2 MiB */
    uint64_t extent_from, extent_end; /* of the cache's file that was last looked up */
    int extent_is_data;
};

/* Touches first, but not for ever: a guest that touches without pause gains by what comes ahead. */
static void let_touches_pass(struct imagefs_pager *pager)
{
    for (int turns = 0; turns < 64 && __atomic_load_n(&pager->in_hand, __ATOMIC_RELAXED); turns++)
        sched_yield();
}

static int install_batch(struct ahead *ahead, uint64_t page, uint64_t count, const uint8_t *data)
{
    enum pager_result result;

    let_touches_pass(ahead->pager);
    while ((result = pager_install(ahead->pager, page, count, data)) == PAGER_AGAIN)
        sched_yield();
    COUNT(ahead->pager, ahead_pages, count);
    return result == PAGER_DONE;
}

/* The next batch at `page`, of present pages or, without a cache, of arrived ones. 0: no more of it; else its length. */
static uint64_t bring(struct ahead *ahead, uint64_t page, uint64_t count)
{
    struct imagefs_pager *pager = ahead->pager;
    uint64_t first = page, unit = pager_unit(pager, page, &first);
    uint64_t batch = pager->options.batch_pages;

    if (unit == 0 || page != first || count < unit)
        return 1; /* not mapped, or part of a large page */
    if (pager->present && unit == 1) {
        if (page < ahead->extent_from || page >= ahead->extent_end) {
            ahead->extent_from = page;
            ahead->extent_is_data = pager_cache_extent(pager, page, &ahead->extent_end);
        }
        if (count > ahead->extent_end - page)
            count = ahead->extent_end - page;
        if (!ahead->extent_is_data) {
            /* What arrives fills holes: it counts what is so now, after the bits were seen. */
            count = count < ZERO_BATCH ? count : ZERO_BATCH;
            ahead->extent_end = page;
            return install_batch(ahead, page, count, NULL) ? count : 0;
        }
    }
    batch = batch > unit ? batch : unit;
    count = count < batch ? count : batch;
    count -= count % unit;
    if (pager->present ? pager_read_cache(pager, page, count, ahead->buffer, 1)
                       : pager_read_memory(pager, page, count, ahead->buffer))
        return count; /* whoever touches it finds out */
    return install_batch(ahead, page, count, ahead->buffer) ? count : 0;
}

/* The first page from `page` on that is here and not answered; *count: how many follow, `most` at most. */
static uint64_t next_run(struct imagefs_pager *pager, uint64_t page, uint64_t stop, uint64_t *count)
{
    const uint8_t *answered = pager_answered(pager->state);
    uint64_t seen, end;

    do {
        seen = page = imagefs_bits_run(answered, page, stop, 1);
        if (pager->present)
            page = imagefs_bits_run(pager->present, page, stop, 0);
    } while (page != seen);
    end = stop - page > ZERO_BATCH ? page + ZERO_BATCH : stop;
    end = imagefs_bits_run(answered, page, end, 0);
    if (pager->present)
        end = imagefs_bits_run(pager->present, page, end, 1);
    *count = end - page;
    return page;
}

static void install_range(struct ahead *ahead, uint64_t page, uint64_t stop);

static void follow_hint(struct ahead *ahead)
{
    struct imagefs_pager *pager = ahead->pager;
    uint64_t hint = __atomic_exchange_n(&pager->hint, 0, __ATOMIC_RELAXED);
    uint64_t window = pager->options.window_pages;

    if (hint && pager->present) {
        uint64_t first = (hint - 1) & ~(window - 1), stop = first + window;

        install_range(ahead, first, stop < pager->options.pages ? stop : pager->options.pages);
    }
}

static void install_range(struct ahead *ahead, uint64_t page, uint64_t stop)
{
    while (pager_running(ahead->pager)) {
        uint64_t count;
        uint64_t step;

        page = next_run(ahead->pager, page, stop, &count);
        if (page >= stop)
            return;
        step = bring(ahead, page, count);
        if (step == 0)
            return;
        page += step;
    }
}

/* The same over much, with a look at what is being touched after every piece. */
static void sweep(struct ahead *ahead, uint64_t page, uint64_t stop)
{
    for (uint64_t end; page < stop && pager_running(ahead->pager); page = end) {
        end = (page | (ZERO_BATCH - 1)) + 1;
        end = end < stop ? end : stop;
        follow_hint(ahead);
        install_range(ahead, page, end);
    }
}

static void take_line(struct ahead *ahead, char *line)
{
    uint64_t pages = ahead->pager->options.pages;
    char *rest;
    unsigned long long page = strtoull(line, &rest, 10), count = strtoull(rest, NULL, 10);

    if (page < pages && count > 0)
        sweep(ahead, page, count < pages - page ? page + count : pages);
}

/* Lines until the end of the stream. Returns whether all has arrived; an unreadable stream only ends the installing
 * ahead. */
static int follow_arrivals(struct ahead *ahead)
{
    struct imagefs_pager *pager = ahead->pager;
    char *text = malloc(LINES + 1);
    size_t have = 0;
    int all = 0;

    while (text && pager_running(pager)) {
        ssize_t got = read(pager->options.arrivals_fd, text + have, LINES - have);
        char *line = text, *end;

        if (got < 0 && errno == EINTR)
            continue;
        all = got == 0;
        if (got <= 0)
            break;
        have += (size_t)got;
        text[have] = '\0';
        for (; (end = strchr(line, '\n')); line = end + 1) {
            *end = '\0';
            take_line(ahead, line);
        }
        have = (size_t)(text + have - line);
        if (have == LINES)
            have = 0; /* no line is that long */
        memmove(text, line, have);
    }
    free(text);
    return all;
}

/* Returns 0 where a page cannot be had, or the pager has ended. */
static int bring_rest(struct ahead *ahead)
{
    struct imagefs_pager *pager = ahead->pager;
    const uint8_t *answered = pager_answered(pager->state);
    uint64_t batch = pager->options.batch_pages;

    for (uint64_t page = 0, end; page < pager->options.pages && pager_running(pager); page = end) {
        uint64_t first, unit = pager_unit(pager, page, &first);

        end = page + 1;
        if (unit == 0 || page != first || imagefs_bits_all(answered, page, 1))
            continue;
        end = page + unit;
        if (unit == 1) {
            end = pager->options.pages - page > batch ? page + batch : pager->options.pages;
            end = imagefs_bits_run(answered, page, end, 0);
        }
        if (pager_read_memory(pager, page, end - page, ahead->buffer) ||
            !install_batch(ahead, page, end - page, ahead->buffer))
            return 0; /* whoever touches it finds out */
    }
    return pager_running(pager);
}

/* All has arrived: the pages that the cache could not take, too. A forked VMM may take its time to go. */
static void install_rest(struct ahead *ahead)
{
    struct imagefs_pager *pager = ahead->pager;
    struct pollfd end = {pager->wake_fd, POLLIN, 0};

    while (bring_rest(ahead) && !pager_complete(pager))
        poll(&end, 1, LONG_PAUSE);
}

void *pager_ahead(void *argument)
{
    struct imagefs_pager *pager = argument;
    struct ahead ahead = {.pager = pager};
    const struct imagefs_pager_options *options = &pager->options;
    size_t batch = options->batch_pages > 512 ? options->batch_pages : 512;

    /* On a busy machine a touch's thread runs first. Nothing to be done where that is refused. */
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), NICE);
    ahead.buffer = aligned_alloc(PAGE, batch * PAGE);
    if (ahead.buffer == NULL)
        return NULL;
    for (size_t i = 0; pager->present && i < options->order_count; i++)
        if (options->order[i].page < options->pages)
            sweep(&ahead, options->order[i].page,
                  options->order[i].count < options->pages - options->order[i].page
                      ? options->order[i].page + options->order[i].count
                      : options->pages);
    if (pager->present)
        sweep(&ahead, 0, options->pages);
    if (options->arrivals_fd >= 0 && follow_arrivals(&ahead))
        install_rest(&ahead);
    free(ahead.buffer);
    return NULL;
}
