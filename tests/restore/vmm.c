/*
 * A VMM as Firecracker is one when it resumes a snapshot with the backend "Uffd": anonymous memory registered for
 * missing pages, its userfaultfd handed over in one message, socket and userfaultfd kept open. Then threads, as vCPUs
 * and a balloon would, read, write and give back pages, and check every byte.
 *
 *   vmm image FILE PAGES                          the image that `run` expects
 *   vmm run SOCKET PAGES SEED OPTION…
 *     regions=N   of about the same size, end to end in the image (default 1)
 *     threads=N   (default 4)
 *     huge        hugetlbfs, 2 MiB pages
 *     kib         the page size under its old name only
 *     split       the first message brings no descriptor
 *     quiet       no thread begins before a line comes on standard input
 *
 * It goes on until its standard input ends; then every page is checked once more, and it says "ok". Any wrong byte ends
 * it with status 1, and the page.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096u
#define HUGE_PAGE (512 * PAGE)
#define WORDS (PAGE / 8)
#define BLOCK 8u /* pages that one thread owns */
#define MOST 16u

static void need(int right, const char *what)
{
    if (!right) {
        fprintf(stderr, "vmm: %s: %s\n", what, strerror(errno));
        exit(2);
    }
}

static uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u; /* splitmix64 (Steele, Lea, Flood 2014) */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Incompressible, but every seventh page is zeros. */
static uint64_t word(uint64_t page, unsigned i)
{
    return page % 7 == 0 ? 0 : mix(page * WORDS + i);
}

static void make_image(const char *path, uint64_t pages)
{
    FILE *file = fopen(path, "wb");

    need(file != NULL, path);
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t words[WORDS];

        for (unsigned i = 0; i < WORDS; i++)
            words[i] = word(page, i);
        need(fwrite(words, PAGE, 1, file) == 1, path);
    }
    need(fclose(file) == 0, path);
}

/* ---- the handshake ---- */

struct vmm {
    uint64_t pages, seed;
    unsigned regions, threads;
    int huge, kib, split, quiet;
    uint8_t *at[MOST];
    uint64_t first[MOST + 1]; /* page of each region, and the end */
    int stop;                 /* atomic */
    uint64_t touched, given_back;
};

static void send_all(const struct vmm *vmm, const char *path, int uffd)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int through = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char text[MOST * 160] = "[", control[CMSG_SPACE(sizeof uffd)] = {0};
    struct iovec body = {text, 0};
    struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1};
    struct cmsghdr *header = (struct cmsghdr *)(void *)control;
    unsigned size = vmm->huge ? HUGE_PAGE : PAGE;

    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    need(connect(through, (const struct sockaddr *)&address, sizeof address) == 0, path);
    for (unsigned i = 0; i < vmm->regions; i++) {
        size_t used = strlen(text);

        snprintf(text + used, sizeof text - used, "%s{\"base_host_virt_addr\":%llu,\"size\":%llu,\"offset\":%llu,",
                 i ? "," : "", (unsigned long long)(uintptr_t)vmm->at[i],
                 (unsigned long long)(vmm->first[i + 1] - vmm->first[i]) * PAGE,
                 (unsigned long long)vmm->first[i] * PAGE);
        used = strlen(text);
        if (vmm->kib)
            snprintf(text + used, sizeof text - used, "\"page_size_kib\":%u}", size);
        else
            snprintf(text + used, sizeof text - used, "\"page_size\":%u,\"page_size_kib\":%u}", size, size);
    }
    strcat(text, "]");
    body.iov_len = strlen(text);
    if (vmm->split) {
        need(sendmsg(through, &message, 0) == (ssize_t)body.iov_len, "sendmsg");
        usleep(50000);
    }
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof uffd);
    memcpy(CMSG_DATA(header), &uffd, sizeof uffd);
    need(sendmsg(through, &message, 0) == (ssize_t)body.iov_len, "sendmsg");
    /* Neither `through` nor `uffd` is ever closed. */
}

static void begin(struct vmm *vmm, const char *path)
{
    struct uffdio_api api = {UFFD_API, UFFD_FEATURE_EVENT_REMOVE, 0};
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    uint64_t unit = vmm->huge ? 512 : 1;

    need(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0, "userfaultfd");
    for (unsigned i = 0; i < vmm->regions; i++) {
        size_t size;
        struct uffdio_register one = {.mode = UFFDIO_REGISTER_MODE_MISSING};

        vmm->first[i] = vmm->pages / unit * i / vmm->regions * unit;
        vmm->first[i + 1] = vmm->pages / unit * (i + 1) / vmm->regions * unit;
        size = (vmm->first[i + 1] - vmm->first[i]) * PAGE;
        vmm->at[i] = mmap(NULL, size, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (vmm->huge ? MAP_HUGETLB : 0), -1, 0);
        need(vmm->at[i] != MAP_FAILED, "mmap");
        one.range = (struct uffdio_range){(uintptr_t)vmm->at[i], size};
        need(ioctl(uffd, UFFDIO_REGISTER, &one) == 0, "UFFDIO_REGISTER");
    }
    send_all(vmm, path, uffd);
}

/* ---- the guest ---- */

struct vcpu {
    struct vmm *vmm;
    unsigned number;
};

static uint64_t *page_at(const struct vmm *vmm, uint64_t page)
{
    unsigned i = 0;

    while (page >= vmm->first[i + 1])
        i++;
    return (uint64_t *)(void *)(vmm->at[i] + (page - vmm->first[i]) * PAGE);
}

/* expected: 0 for the image, 1 for zeros, else the word that fills the page. */
static void check(const struct vmm *vmm, uint64_t page, uint64_t expected)
{
    const uint64_t *at = page_at(vmm, page);

    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t right = expected == 0 ? word(page, i) : expected == 1 ? 0 : expected;

        if (at[i] != right) {
            fprintf(stderr, "vmm: page %llu word %u: %#llx instead of %#llx\n", (unsigned long long)page, i,
                    (unsigned long long)at[i], (unsigned long long)right);
            exit(1);
        }
    }
}

/* Owns every `threads` + 1st block, the last of which is everyone's and never changed. */
static void *run_vcpu(void *argument)
{
    const struct vcpu *self = argument;
    struct vmm *vmm = self->vmm;
    uint64_t state = mix(vmm->seed + self->number), block = vmm->huge ? 512 : BLOCK;
    uint64_t *expected = calloc(vmm->pages, sizeof *expected);

    need(expected != NULL, "calloc");
    while (!__atomic_load_n(&vmm->stop, __ATOMIC_ACQUIRE)) {
        uint64_t page = (state = mix(state)) % vmm->pages, owner = page / block % (vmm->threads + 1);
        uint64_t action = (state = mix(state)) % 16;

        if (owner != self->number && owner != vmm->threads)
            continue;
        check(vmm, page, expected[page]);
        __atomic_fetch_add(&vmm->touched, 1, __ATOMIC_RELAXED);
        if (owner == vmm->threads)
            continue;
        if (action == 0) {
            expected[page] = state | 2;
            for (unsigned i = 0; i < WORDS; i++)
                page_at(vmm, page)[i] = expected[page];
        } else if (action == 1) {
            uint64_t from = vmm->huge ? page - page % block : page, count = block - from % block;

            if (from + count > vmm->pages)
                count = vmm->pages - from;
            for (uint64_t i = 0; i < count; i++) {
                /* Page by page: a block may lie across the end of a region. */
                if (!vmm->huge)
                    need(madvise(page_at(vmm, from + i), PAGE, MADV_DONTNEED) == 0, "madvise");
                expected[from + i] = 1;
            }
            if (vmm->huge)
                need(madvise(page_at(vmm, from), HUGE_PAGE, MADV_DONTNEED) == 0, "madvise");
            __atomic_fetch_add(&vmm->given_back, count, __ATOMIC_RELAXED);
        }
    }
    for (uint64_t page = 0; page < vmm->pages; page++)
        if (page / block % (vmm->threads + 1) == self->number || page / block % (vmm->threads + 1) == vmm->threads)
            check(vmm, page, expected[page]);
    free(expected);
    return NULL;
}

static void run(struct vmm *vmm)
{
    pthread_t threads[MOST];
    struct vcpu vcpus[MOST];
    char line[64];

    if (vmm->quiet)
        need(fgets(line, sizeof line, stdin) != NULL, "standard input");
    for (unsigned i = 0; i < vmm->threads; i++) {
        vcpus[i] = (struct vcpu){vmm, i};
        need(pthread_create(&threads[i], NULL, run_vcpu, &vcpus[i]) == 0, "pthread_create");
    }
    while (fgets(line, sizeof line, stdin)) {
        /* Any line is answered: it lives. */
        printf("touched %llu\n", (unsigned long long)__atomic_load_n(&vmm->touched, __ATOMIC_RELAXED));
        fflush(stdout);
    }
    __atomic_store_n(&vmm->stop, 1, __ATOMIC_RELEASE);
    for (unsigned i = 0; i < vmm->threads; i++)
        need(pthread_join(threads[i], NULL) == 0, "pthread_join");
    printf("ok touched=%llu given_back=%llu\n", (unsigned long long)vmm->touched, (unsigned long long)vmm->given_back);
}

int main(int argc, char **argv)
{
    struct vmm vmm = {.regions = 1, .threads = 4};

    if (argc == 4 && strcmp(argv[1], "image") == 0) {
        make_image(argv[2], strtoull(argv[3], NULL, 10));
        return 0;
    }
    if (argc < 5 || strcmp(argv[1], "run")) {
        fputs("vmm: see the source\n", stderr);
        return 2;
    }
    vmm.pages = strtoull(argv[3], NULL, 10);
    vmm.seed = strtoull(argv[4], NULL, 10);
    for (int i = 5; i < argc; i++) {
        vmm.huge |= strcmp(argv[i], "huge") == 0;
        vmm.kib |= strcmp(argv[i], "kib") == 0;
        vmm.split |= strcmp(argv[i], "split") == 0;
        vmm.quiet |= strcmp(argv[i], "quiet") == 0;
        sscanf(argv[i], "regions=%u", &vmm.regions);
        sscanf(argv[i], "threads=%u", &vmm.threads);
    }
    need(vmm.regions >= 1 && vmm.regions <= MOST && vmm.threads >= 1 && vmm.threads < MOST, "options");
    begin(&vmm, argv[2]);
    run(&vmm);
    return 0;
}
