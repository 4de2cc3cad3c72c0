/* The making of a pager: what it is given is checked, and becomes its own. */
#define _GNU_SOURCE
#include "pager_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define EVENT_THREADS 1
#define FETCH_THREADS 16
#define WINDOW_PAGES 16
#define BATCH_PAGES 64
#define MOST_THREADS 1024u

static struct imagefs_pager *refuse(struct imagefs_pager *pager, char *why, size_t size, const char *what)
{
    int error = errno;

    snprintf(why, size, "%s: %s", what, strerror(error));
    imagefs_pager_destroy(pager, 0);
    return NULL;
}

static int duplicate(int fd)
{
    return fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
}

static int duplicate_all(struct imagefs_pager *pager, const struct imagefs_pager_options *options)
{
    struct imagefs_pager_options *own = &pager->options;

    own->uffd = duplicate(options->uffd);
    own->memory_fd = duplicate(options->memory_fd);
    own->cache_fd = duplicate(options->cache_fd);
    own->arrivals_fd = duplicate(options->arrivals_fd);
    own->trace_fd = duplicate(options->trace_fd);
    pager->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pager->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (own->uffd < 0 || own->memory_fd < 0 || pager->wake_fd < 0 || pager->ended_fd < 0 ||
        (own->cache_fd < 0) != (options->cache_fd < 0) || (own->arrivals_fd < 0) != (options->arrivals_fd < 0) ||
        (own->trace_fd < 0) != (options->trace_fd < 0))
        return -1;
    return fcntl(own->uffd, F_SETFL, fcntl(own->uffd, F_GETFL) | O_NONBLOCK);
}

static void *map_whole(int fd, size_t size, int protection)
{
    struct stat status;
    void *at;

    if (fstat(fd, &status))
        return NULL;
    if ((uint64_t)status.st_size < size) {
        errno = EINVAL;
        return NULL;
    }
    at = mmap(NULL, size, protection, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? NULL : at;
}

static void set_defaults(struct imagefs_pager_options *own)
{
    own->event_threads = own->event_threads ? own->event_threads : EVENT_THREADS;
    own->fetch_threads = own->fetch_threads ? own->fetch_threads : FETCH_THREADS;
    own->window_pages = own->window_pages ? own->window_pages : WINDOW_PAGES;
    own->batch_pages = own->batch_pages ? own->batch_pages : BATCH_PAGES;
}

static const char *bad_option(const struct imagefs_pager_options *options)
{
    if (options->pages == 0 || imagefs_pager_state_size(options->pages) == 0)
        return "pages: out of bounds";
    if ((options->cache_fd < 0) != (options->present_fd < 0))
        return "cache: the page file and its bitmap go together";
    if (options->window_pages > 512 || (options->window_pages & (options->window_pages - 1)))
        return "window_pages: not a power of two up to 512";
    if (options->batch_pages > 512)
        return "batch_pages: more than 512";
    if (options->event_threads > MOST_THREADS || options->fetch_threads > MOST_THREADS)
        return "threads: more than 1024";
    return NULL;
}

struct imagefs_pager *imagefs_pager_create(const struct imagefs_pager_options *options, char *why, size_t why_size)
{
    const char *bad = bad_option(options);
    struct imagefs_pager *pager;
    pthread_rwlockattr_t fair;
    int taken;

    if (bad) {
        snprintf(why, why_size, "%s", bad);
        return NULL;
    }
    pager = calloc(1, sizeof *pager);
    if (pager == NULL) {
        snprintf(why, why_size, "no memory");
        return NULL;
    }
    pager->options = *options;
    pager->options.order = NULL;
    pager->options.regions = NULL;
    pager->queue_end = &pager->queue;
    pthread_rwlockattr_init(&fair);
    /* A stream of installs must not keep messages from being read. */
    pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&pager->changes, &fair);
    pthread_rwlockattr_destroy(&fair);
    pthread_mutex_init(&pager->lock, NULL);
    pthread_cond_init(&pager->work, NULL);
    pthread_cond_init(&pager->left, NULL);
    set_defaults(&pager->options);
    if (duplicate_all(pager, options))
        return refuse(pager, why, why_size, "file descriptors");
    if (options->order_count) {
        struct imagefs_pager_run *order = malloc(options->order_count * sizeof *order);

        if (order == NULL)
            return refuse(pager, why, why_size, "order");
        pager->options.order = memcpy(order, options->order, options->order_count * sizeof *order);
    }
    if (options->present_fd >= 0) {
        pager->present_size = (size_t)(options->pages + 7) / 8;
        pager->present = map_whole(options->present_fd, pager->present_size, PROT_READ);
        if (pager->present == NULL)
            return refuse(pager, why, why_size, "presence bitmap");
    }
    pager->zeros = mmap(NULL, 512 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pager->zeros == MAP_FAILED) {
        pager->zeros = NULL;
        return refuse(pager, why, why_size, "zeros");
    }
    pager->state_size = imagefs_pager_state_size(options->pages);
    pager->state = map_whole(options->state_fd, pager->state_size, PROT_READ | PROT_WRITE);
    if (pager->state == NULL)
        return refuse(pager, why, why_size, "state");
    /* The kernel writes messages here while a SIGKILL may be pending: it must not have to fault the pages in. */
    if (mlock(&pager->state->journal, sizeof pager->state->journal))
        return refuse(pager, why, why_size, "state: mlock");
    taken = pager_state_open(pager->state, options, why, why_size);
    if (taken < 0) {
        imagefs_pager_destroy(pager, 0);
        return NULL;
    }
    /* Also at the beginning: it writes to the journal, so that its pages are mapped writable. */
    pager_replay(pager);
    if (taken > 0) {
        const struct pager_table *table;

        COUNT(pager, takeovers, 1);
        table = &pager->state->tables[pager->state->active];
        /* Touches that the dead pager had read are not announced again: woken, their threads touch anew. */
        for (uint64_t i = 0; i < table->count; i++)
            pager_wake(pager, table->at[i].start, table->at[i].size);
    }
    return pager;
}
