/* Touches of pages that are not in the cache: threads that wait in reads of the mount, one touch each. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

static int is_listed(const struct pager_fault *list, const struct pager_fault *fault)
{
    for (; list; list = list->next)
        if (list->page == fault->page && list->address == fault->address)
            return 1;
    return 0;
}

int pager_queue(struct imagefs_pager *pager, const struct pager_fault *fault)
{
    int error = 0;

    pthread_mutex_lock(&pager->lock);
    /* One that is listed ends with an install or a wake of its address, which serves this one, too. */
    if (!is_listed(pager->queue, fault) && !is_listed(pager->fetching, fault)) {
        struct pager_fault *copy = malloc(sizeof *copy);

        if (copy == NULL) {
            error = ENOMEM;
        } else {
            *copy = *fault;
            copy->next = NULL;
            *pager->queue_end = copy;
            pager->queue_end = &copy->next;
            pthread_cond_signal(&pager->work);
        }
    }
    pthread_mutex_unlock(&pager->lock);
    return error;
}

static struct pager_fault *take(struct imagefs_pager *pager)
{
    struct pager_fault *fault = NULL;

    pthread_mutex_lock(&pager->lock);
    while (pager_running(pager) && pager->queue == NULL)
        pthread_cond_wait(&pager->work, &pager->lock);
    if (pager_running(pager)) {
        fault = pager->queue;
        pager->queue = fault->next;
        if (pager->queue == NULL)
            pager->queue_end = &pager->queue;
        fault->next = pager->fetching;
        pager->fetching = fault;
    }
    pthread_mutex_unlock(&pager->lock);
    return fault;
}

static void finish(struct imagefs_pager *pager, struct pager_fault *fault)
{
    struct pager_fault **at = &pager->fetching;

    pthread_mutex_lock(&pager->lock);
    while (*at != fault)
        at = &(*at)->next;
    *at = fault->next;
    pthread_mutex_unlock(&pager->lock);
    free(fault);
}

/* Read `count` pages from wherever they are, waiting. */
static int read_pages(struct imagefs_pager *pager, uint64_t page, uint64_t count, uint8_t *out)
{
    return pager_read_cache(pager, page, count, out, 1) ? pager_read_memory(pager, page, count, out) : 0;
}

static void fetch(struct imagefs_pager *pager, const struct pager_fault *fault, uint8_t *buffer)
{
    uint64_t first = fault->page, count = pager_unit(pager, fault->page, &first);
    uint64_t window = pager->options.window_pages;
    uint64_t around = first & ~(window - 1), end = around + window;
    const struct pager_fault unit = {fault->address, first, NULL};
    enum pager_result result;
    int error, alone = 1;

    if (count == 0) { /* unmapped meanwhile */
        pager_wake(pager, fault->address, PAGE);
        return;
    }
    end = end < pager->options.pages ? end : pager->options.pages;
    if (count < end - around) {
        /* What arrives together is read together. If a neighbour cannot be had, that is not this touch's affair. */
        alone = read_pages(pager, around, end - around, buffer) != 0;
    }
    if (alone) {
        around = first;
        end = first + count;
        error = read_pages(pager, first, count, buffer);
        if (error) {
            pager_fail_reading(pager, error, first);
            return;
        }
    }
    COUNT(pager, from_memory, 1);
    while ((result = pager_answer(pager, &unit, count, buffer + (first - around) * PAGE)) == PAGER_AGAIN)
        sched_yield();
    if (result == PAGER_DONE && !alone)
        while (pager_install(pager, around, end - around, buffer) == PAGER_AGAIN)
            sched_yield();
}

void *pager_fetcher(void *argument)
{
    struct imagefs_pager *pager = argument;
    struct pager_fault *fault;
    uint8_t *buffer = aligned_alloc(PAGE, 512 * PAGE);

    if (buffer == NULL)
        pager_fail(pager, ENOMEM, NO_PAGE, "no buffer for a fetching thread");
    while ((fault = take(pager))) {
        fetch(pager, fault, buffer);
        finish(pager, fault);
    }
    free(buffer);
    return NULL;
}
