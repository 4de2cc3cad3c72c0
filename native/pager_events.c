/* The threads that read the userfaultfd: events into the state, touches answered from the cache or handed on. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include "pages.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define SHORT_PAUSE 1 /* milliseconds, where an event is pending that another thread must read */
#define STRANGE 64    /* touches of one unknown address in a row, without any event, until it is nobody's */

struct hand {
    struct pager_fault at[2 * PAGER_MESSAGES];
    size_t count;
    uint64_t stranger; /* unknown address, and how often */
    unsigned times;
};

unsigned pager_children(struct imagefs_pager *pager)
{
    unsigned kept = 0;

    for (unsigned i = 0; i < pager->child_count; i++) {
        struct uffdio_zeropage probe = {.range = {PAGE, PAGE}};

        if (ioctl(pager->children[i], UFFDIO_ZEROPAGE, &probe) && errno == ESRCH)
            close(pager->children[i]);
        else
            pager->children[kept++] = pager->children[i];
    }
    return pager->child_count = kept;
}

/*
 * A forked VMM is not served: its userfaultfd could not survive this process. Its copy is held open, so that the child
 * waits if it touches what it lacks, and never reads zeros; one that only executes another program notices nothing.
 * Requires: `changes` held exclusively.
 */
static void hold_child(struct imagefs_pager *pager, int uffd)
{
    if (pager_children(pager) == PAGER_CHILDREN)
        pager_fail(pager, EMFILE, NO_PAGE, "the VMM has forked %d times and its children live on", PAGER_CHILDREN);
    else
        pager->children[pager->child_count++] = uffd;
    COUNT(pager, forks, 1);
}

/* Requires: `changes` held exclusively. An event, not a touch. */
static void apply(struct imagefs_pager *pager, const struct uffd_msg *message, uint64_t serial, int replayed)
{
    int full = 0;

    switch (message->event) {
    case UFFD_EVENT_REMOVE:
        COUNT(pager, removed_pages, pager_state_remove(pager->state, message->arg.remove.start,
                                                       message->arg.remove.end));
        break;
    case UFFD_EVENT_UNMAP:
        full = pager_table_unmap(pager->state, serial, message->arg.remove.start, message->arg.remove.end);
        COUNT(pager, unmaps, 1);
        pager_wake(pager, message->arg.remove.start, message->arg.remove.end - message->arg.remove.start);
        break;
    case UFFD_EVENT_REMAP:
        full = pager_table_remap(pager->state, serial, message->arg.remap.from, message->arg.remap.to,
                                 message->arg.remap.len);
        COUNT(pager, remaps, 1);
        pager_wake(pager, message->arg.remap.from, message->arg.remap.len);
        break;
    case UFFD_EVENT_FORK:
        /* A dead pager's file descriptor is not ours. */
        if (!replayed)
            hold_child(pager, (int)message->arg.fork.ufd);
        break;
    case UFFD_EVENT_PAGEFAULT:
        break;
    default:
        pager_fail(pager, 0, NO_PAGE, "userfaultfd: event %#x is not understood", message->event);
    }
    if (full)
        pager_fail(pager, 0, NO_PAGE, "the VMM has cut its memory into more than %d pieces", IMAGEFS_PAGER_RANGES);
}

static void journal_apply(struct imagefs_pager *pager, int replayed)
{
    struct pager_state *state = pager->state;

    for (uint64_t i = state->journal.applied; i < PAGER_MESSAGES; i++) {
        if (state->journal.messages[i].event)
            apply(pager, &state->journal.messages[i], state->journal.base + i, replayed);
        __atomic_store_n(&state->journal.applied, i + 1, __ATOMIC_RELEASE);
    }
}

static void journal_clear(struct pager_state *state)
{
    for (size_t i = 0; i < PAGER_MESSAGES; i++)
        state->journal.messages[i].event = 0;
    __atomic_store_n(&state->journal.base, state->journal.base + PAGER_MESSAGES, __ATOMIC_RELEASE);
    __atomic_store_n(&state->journal.applied, 0, __ATOMIC_RELEASE);
}

void pager_replay(struct imagefs_pager *pager)
{
    journal_apply(pager, 1);
    journal_clear(pager->state);
}

/* Whether the VMM waits for an event of its to be read. An invalid copy says so before it says that it is invalid. */
static int event_is_pending(struct imagefs_pager *pager)
{
    struct uffdio_copy nothing = {0};

    return ioctl(pager->options.uffd, UFFDIO_COPY, &nothing) && errno == EAGAIN;
}

/* A touch where no region is: of a range that has just moved or gone, or one that nobody told us of. */
static void stranger(struct imagefs_pager *pager, struct hand *hand, uint64_t address)
{
    if (event_is_pending(pager) || address != hand->stranger) {
        hand->stranger = address;
        hand->times = 0;
    } else if (++hand->times == STRANGE) {
        pager_fail(pager, 0, NO_PAGE, "touch at %#llx, which is in none of the regions", (unsigned long long)address);
    }
    pager_wake(pager, address & ~(uint64_t)(PAGE - 1), PAGE);
}

/* Requires: `changes` held exclusively. */
static void note_touch(struct imagefs_pager *pager, struct hand *hand, const struct uffd_msg *message)
{
    uint64_t address = message->arg.pagefault.address;
    const struct pager_range *range = pager_range_of_address(pager->state, address);
    uint64_t page;

    COUNT(pager, faults, 1);
    if (range == NULL) {
        stranger(pager, hand, address);
        return;
    }
    if (message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) {
        pager_fail(pager, 0, NO_PAGE, "the VMM's memory is registered for minor faults");
        return;
    }
    address -= (address - range->start) % range->page_size;
    page = range->page + (address - range->start) / PAGE;
    if (message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) {
        hand->at[hand->count++] = (struct pager_fault){address, NO_PAGE, NULL};
        return;
    }
    pager_touch(pager->state, page);
    __atomic_store_n(&pager->hint, page + 1, __ATOMIC_RELAXED);
    hand->at[hand->count++] = (struct pager_fault){address, page, NULL};
}

/* Read messages, up to what fits into the hand. Returns how many bytes there were, 0 for none. */
static ssize_t read_messages(struct imagefs_pager *pager, struct hand *hand)
{
    struct pager_state *state = pager->state;
    ssize_t got;

    pthread_rwlock_wrlock(&pager->changes);
    got = read(pager->options.uffd, state->journal.messages, sizeof state->journal.messages);
    if (got > 0) {
        journal_apply(pager, 0);
        for (size_t i = 0; i < (size_t)got / sizeof(struct uffd_msg); i++)
            if (state->journal.messages[i].event == UFFD_EVENT_PAGEFAULT)
                note_touch(pager, hand, &state->journal.messages[i]);
        journal_clear(state);
    } else if (got < 0 && errno != EAGAIN && errno != EINTR) {
        pager_fail(pager, errno, NO_PAGE, "userfaultfd: cannot be read");
    }
    pthread_rwlock_unlock(&pager->changes);
    return got > 0 ? got : 0;
}

static enum pager_result answer_touch(struct imagefs_pager *pager, const struct pager_fault *fault, uint8_t *buffer)
{
    uint64_t first, unit = 1;
    enum pager_result result;

    if (fault->page == NO_PAGE) {
        result = pager_unprotect(pager, fault->address);
        if (result == PAGER_DONE)
            COUNT(pager, unprotected, 1);
        return result;
    }
    unit = pager_unit(pager, fault->page, &first);
    if (unit == 0) {
        pager_wake(pager, fault->address, PAGE);
        return PAGER_DONE;
    }
    /* What is answered gets zeros whatever is read here, so that nothing need be read. */
    if (imagefs_bits_all(pager_answered(pager->state), fault->page, 1))
        return pager_answer(pager, fault, unit, NULL);
    if (pager_read_cache(pager, fault->page, unit, buffer, 0) == 0) {
        result = pager_answer(pager, fault, unit, buffer);
        if (result == PAGER_DONE)
            COUNT(pager, from_cache, 1);
        return result;
    }
    if (pager_queue(pager, fault)) {
        pager_fail(pager, ENOMEM, fault->page, "no memory to remember a touch");
        return PAGER_ENDED;
    }
    return PAGER_DONE;
}

static void wait_for_messages(struct imagefs_pager *pager, int milliseconds)
{
    struct pollfd fds[2] = {{pager->options.uffd, POLLIN, 0}, {pager->wake_fd, POLLIN, 0}};

    if (poll(fds, 2, milliseconds) > 0 && fds[0].revents & (POLLERR | POLLNVAL))
        pager_fail(pager, EBADF, NO_PAGE, "userfaultfd: cannot be polled");
}

void *pager_events(void *argument)
{
    struct imagefs_pager *pager = argument;
    struct hand hand = {.count = 0};
    uint8_t *buffer = aligned_alloc(PAGE, 512 * PAGE);

    if (buffer == NULL)
        pager_fail(pager, ENOMEM, NO_PAGE, "no buffer for the event thread");
    while (pager_running(pager)) {
        ssize_t got = hand.count <= PAGER_MESSAGES ? read_messages(pager, &hand) : 0;
        size_t left = 0, had = hand.count;

        for (size_t i = 0; i < had && pager_running(pager); i++) {
            __atomic_store_n(&pager->in_hand, had - i, __ATOMIC_RELAXED);
            if (answer_touch(pager, &hand.at[i], buffer) == PAGER_AGAIN)
                hand.at[left++] = hand.at[i];
        }
        __atomic_store_n(&pager->in_hand, 0, __ATOMIC_RELAXED);
        hand.count = left;
        if (left > 0)
            sched_yield(); /* until the thread whose event was read has run */
        if (got == 0)
            wait_for_messages(pager, left ? SHORT_PAUSE : -1);
    }
    free(buffer);
    return NULL;
}
