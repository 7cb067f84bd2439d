/* A disk that turns read-only while a file is there: READ_ONLY_WHILE names it, READ_ONLY_PATH a word of the paths it is true of.
   The kernel does so where a disk fails; `mount -o remount,ro` does not while files are open for writing. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <unistd.h>

static int is_read_only(const char *path) {
    const char *flag = getenv("READ_ONLY_WHILE"), *word = getenv("READ_ONLY_PATH");
    return flag && word && path && strstr(path, word) && !access(flag, F_OK);
}

static int is_on_it(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    return is_read_only(path);
}

static int refused(void) {
    errno = EROFS;
    return -1;
}

#define REAL(name) dlsym(RTLD_NEXT, name)

ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) {
    ssize_t (*real)(int, const void *, size_t, off_t) = REAL("pwrite64");
    return is_on_it(fd) ? refused() : real(fd, data, n, at);
}

ssize_t write(int fd, const void *data, size_t n) {
    ssize_t (*real)(int, const void *, size_t) = REAL("write");
    return is_on_it(fd) ? refused() : real(fd, data, n);
}

int open64(const char *path, int flags, ...) {
    int (*real)(const char *, int, ...) = REAL("open64");
    va_list rest;
    va_start(rest, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;
    va_end(rest);
    return flags & (O_WRONLY | O_RDWR | O_CREAT) && is_read_only(path) ? refused() : real(path, flags, mode);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = REAL("rename");
    return is_read_only(to) ? refused() : real(from, to);
}

int statvfs64(const char *path, struct statvfs64 *found) {
    int (*real)(const char *, struct statvfs64 *) = REAL("statvfs64");
    int failed = real(path, found);
    if (!failed && is_read_only(path)) found->f_flag |= ST_RDONLY;
    return failed;
}
