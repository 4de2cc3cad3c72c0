/* The ioctls of userfaultfd, and what each of their errors means. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include "pages.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

/* Pages that one look at the answered bits covers; the batches of all callers are smaller. */
#define MOST 512u

void pager_wake(struct imagefs_pager *pager, uint64_t address, uint64_t size)
{
    struct uffdio_range range = {address, size};

    ioctl(pager->options.uffd, UFFDIO_WAKE, &range);
}

/* One ioctl. *done: bytes that it installed, also where it returns an error (an errno). */
static int install_once(struct imagefs_pager *pager, uint64_t address, const uint8_t *data, uint64_t size,
                        int by_copy, uint64_t *done)
{
    int64_t result;
    int error;

    if (by_copy) {
        struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)data, .len = size};

        error = ioctl(pager->options.uffd, UFFDIO_COPY, &copy) ? errno : 0;
        result = copy.copy;
    } else {
        struct uffdio_zeropage zero = {.range = {address, size}};

        error = ioctl(pager->options.uffd, UFFDIO_ZEROPAGE, &zero) ? errno : 0;
        result = zero.zeropage;
    }
    *done = result > 0 ? (uint64_t)result : 0;
    return error;
}

/* Requires: `changes` held. Installs `size` bytes at `address`, which is behind `page`; data NULL for zeros. */
static enum pager_result install_bytes(struct imagefs_pager *pager, uint64_t address, uint64_t page,
                                       uint64_t page_size, const uint8_t *data, uint64_t size)
{
    int by_copy = data != NULL || page_size > PAGE;

    while (size > 0) {
        uint64_t done, step = size;
        int error;

        if (by_copy && data == NULL && step > MOST * PAGE)
            step = MOST * PAGE;
        error = install_once(pager, address, data ? data : pager->zeros, step, by_copy, &done);
        if (error == 0)
            done = step;
        /* Some, then an error, which the next call will say. */
        if (error == EAGAIN && done > 0)
            error = 0;
        if (error == EEXIST) {
            /* Somebody was first; a thread that waited for this page nevertheless may still sleep. */
            done = page_size;
            pager_wake(pager, address, page_size);
            COUNT(pager, existed, page_size / PAGE);
        } else if (error == EAGAIN) {
            COUNT(pager, again, 1);
            return PAGER_AGAIN;
        } else if (error == ENOENT) {
            /* Unmapped or moved, and its message not read yet. Who waits there finds out by itself. */
            COUNT(pager, vanished, size / PAGE);
            pager_wake(pager, address, size);
            return PAGER_DONE;
        } else if (error == ESRCH) {
            pager_end(pager, IMAGEFS_PAGER_VMM_GONE);
            return PAGER_ENDED;
        } else if (error == EINVAL && !by_copy) {
            by_copy = 1; /* memory that has no zero page */
            continue;
        } else if (error) {
            pager_fail(pager, error, page, "cannot install %s", data ? "it" : "zeros");
            return PAGER_ENDED;
        } else if (data) {
            COUNT(pager, copied_pages, done / PAGE);
        } else {
            COUNT(pager, zero_pages, done / PAGE);
        }
        imagefs_bits_set(pager_answered(pager->state), page, done / PAGE);
        address += done;
        page += done / PAGE;
        size -= done;
        data = data ? data + done : NULL;
    }
    return PAGER_DONE;
}

/* Requires: `changes` held. A run of one range, none of it answered. Zeros within the data become zero pages. */
static enum pager_result install_unanswered(struct imagefs_pager *pager, const struct pager_range *range,
                                            uint64_t page, uint64_t count, const uint8_t *data)
{
    uint64_t address = range->start + (page - range->page) * PAGE;
    uint8_t used[MOST / 8];

    if (data == NULL || range->page_size > PAGE)
        return install_bytes(pager, address, page, range->page_size, data, count * PAGE);
    imagefs_scan(data, count, used);
    for (uint64_t at = 0, end; at < count; at = end) {
        int is_used = imagefs_bits_all(used, at, 1);
        enum pager_result result;

        end = imagefs_bits_run(used, at, count, is_used);
        result = install_bytes(pager, address + at * PAGE, page + at, PAGE, is_used ? data + at * PAGE : NULL,
                               (end - at) * PAGE);
        if (result != PAGER_DONE)
            return result;
    }
    return PAGER_DONE;
}

/* Requires: `changes` held. */
static enum pager_result install_locked(struct imagefs_pager *pager, uint64_t page, uint64_t count,
                                        const uint8_t *data)
{
    const uint8_t *answered = pager_answered(pager->state);
    uint64_t stop = page + count;
    enum pager_result result = PAGER_DONE;

    for (uint64_t end; page < stop && result == PAGER_DONE; data = data ? data + (end - page) * PAGE : NULL, page = end) {
        const struct pager_range *range = pager_range_of_page(pager->state, page);
        uint64_t unit, last;

        end = page + 1;
        if (range == NULL)
            continue;
        unit = range->page_size / PAGE;
        if ((page - range->page) % unit || page + unit > stop)
            continue; /* part of a large page */
        end = page + unit;
        if (imagefs_bits_all(answered, page, 1))
            continue;
        last = range->page + range->size / PAGE;
        last = last < stop ? last : stop;
        last = last < page + MOST ? last : page + MOST;
        if (unit == 1)
            end = imagefs_bits_run(answered, page, last, 0);
        else
            while (end + unit <= last && !imagefs_bits_all(answered, end, 1))
                end += unit;
        result = install_unanswered(pager, range, page, end - page, data);
    }
    return result;
}

enum pager_result pager_install(struct imagefs_pager *pager, uint64_t page, uint64_t count, const uint8_t *data)
{
    enum pager_result result = PAGER_ENDED;

    pthread_rwlock_rdlock(&pager->changes);
    if (pager_running(pager))
        result = install_locked(pager, page, count, data);
    pthread_rwlock_unlock(&pager->changes);
    return result;
}

enum pager_result pager_answer(struct imagefs_pager *pager, const struct pager_fault *fault, uint64_t count,
                               const uint8_t *data)
{
    enum pager_result result = PAGER_ENDED;
    const struct pager_range *range;

    pthread_rwlock_rdlock(&pager->changes);
    if (pager_running(pager)) {
        range = pager_range_of_page(pager->state, fault->page);
        if (range && imagefs_bits_all(pager_answered(pager->state), fault->page, 1)) {
            COUNT(pager, from_nothing, 1);
            result = install_bytes(pager, range->start + (fault->page - range->page) * PAGE, fault->page,
                                   range->page_size, NULL, range->page_size);
        } else {
            result = install_locked(pager, fault->page, count, data);
        }
        /* The page has moved since, and so may have the thread's view of it: it must look again. */
        if (result == PAGER_DONE && (!range || range->start + (fault->page - range->page) * PAGE != fault->address))
            pager_wake(pager, fault->address, PAGE);
    }
    pthread_rwlock_unlock(&pager->changes);
    return result;
}

enum pager_result pager_unprotect(struct imagefs_pager *pager, uint64_t address)
{
    enum pager_result result = PAGER_ENDED;

    pthread_rwlock_rdlock(&pager->changes);
    if (pager_running(pager)) {
        const struct pager_range *range = pager_range_of_address(pager->state, address);
        uint64_t size = range ? range->page_size : PAGE;
        struct uffdio_writeprotect allow = {.range = {address & ~(size - 1), size}};
        int error = ioctl(pager->options.uffd, UFFDIO_WRITEPROTECT, &allow) ? errno : 0;

        result = PAGER_DONE;
        if (error == EAGAIN) {
            result = PAGER_AGAIN;
        } else if (error == ENOENT) {
            pager_wake(pager, allow.range.start, size);
        } else if (error == ESRCH) {
            pager_end(pager, IMAGEFS_PAGER_VMM_GONE);
            result = PAGER_ENDED;
        } else if (error) {
            pager_fail(pager, error, range ? range->page + (address - range->start) / PAGE : NO_PAGE,
                       "cannot lift its write protection");
            result = PAGER_ENDED;
        }
    }
    pthread_rwlock_unlock(&pager->changes);
    return result;
}

uint64_t pager_unit(struct imagefs_pager *pager, uint64_t page, uint64_t *first)
{
    const struct pager_range *range;
    uint64_t unit = 0;

    pthread_rwlock_rdlock(&pager->changes);
    range = pager_range_of_page(pager->state, page);
    if (range) {
        unit = range->page_size / PAGE;
        *first = page - (page - range->page) % unit;
    }
    pthread_rwlock_unlock(&pager->changes);
    return unit;
}

/* Requires: `changes` held exclusively. */
static int is_all_answered(struct pager_state *state)
{
    const struct pager_table *table = &state->tables[state->active];

    for (uint64_t i = 0; i < table->count; i++)
        if (!imagefs_bits_all(pager_answered(state), table->at[i].page, table->at[i].size / PAGE))
            return 0;
    return 1;
}

int pager_complete(struct imagefs_pager *pager)
{
    const struct pager_table *table;
    int ended;

    pthread_rwlock_wrlock(&pager->changes);
    table = &pager->state->tables[pager->state->active];
    if (pager_running(pager) && is_all_answered(pager->state) && pager_children(pager) == 0) {
        uint64_t i = 0;

        /* It also wakes who waits there. Refused where part was unmapped and the message is still to come. */
        for (; i < table->count; i++) {
            struct uffdio_range range = {table->at[i].start, table->at[i].size};

            if (ioctl(pager->options.uffd, UFFDIO_UNREGISTER, &range))
                break;
        }
        if (i == table->count)
            pager_end(pager, IMAGEFS_PAGER_COMPLETE);
    }
    ended = !pager_running(pager);
    pthread_rwlock_unlock(&pager->changes);
    return ended;
}
