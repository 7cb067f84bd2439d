/* Fails the Nth call of one function on paths that hold a word: FAIL_CALL=write FAIL_NTH=3 FAIL_ERRNO=28 FAIL_PATH=/out/
   Counts over all processes of a run, in the file FAIL_COUNT, one byte a call. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int is_due(const char *call, const char *path) {
    const char *wanted = getenv("FAIL_CALL"), *word = getenv("FAIL_PATH"), *count = getenv("FAIL_COUNT");
    if (!wanted || strcmp(wanted, call) || !path || !strstr(path, word)) return 0;
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    int fd = real_open(count, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (fd < 0) return 0;
    real_write(fd, "x", 1);
    struct stat status;
    long n = fstat(fd, &status) ? 0 : status.st_size;
    close(fd);
    return n == atol(getenv("FAIL_NTH"));
}

static int of_fd(const char *call, int fd) {
    char link[64], path[4096];
    if (!getenv("FAIL_CALL") || strcmp(getenv("FAIL_CALL"), call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    return is_due(call, path);
}

static int failed(void) {
    errno = atoi(getenv("FAIL_ERRNO"));
    return -1;
}

ssize_t write(int fd, const void *data, size_t n) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    if (!of_fd("write", fd)) return real(fd, data, n);
    if (n > 1) real(fd, data, n / 2); /* half of it is there, as on a disk that fills up */
    return failed();
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return of_fd("fsync", fd) ? failed() : real(fd);
}

int syncfs(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "syncfs");
    return of_fd("fsync", fd) ? failed() : real(fd);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return is_due("rename", to) ? failed() : real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    int (*real)(int, const char *, int, const char *) = dlsym(RTLD_NEXT, "renameat");
    return is_due("rename", to) ? failed() : real(a, from, b, to);
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, name);
    return (flags & (O_CREAT | O_WRONLY | O_RDWR)) && is_due("open", path) ? failed() : real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, int);
    va_end(more);
    return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, int);
    va_end(more);
    return opened("open64", path, flags, mode);
}
