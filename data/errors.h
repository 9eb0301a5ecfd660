// data/errors.h -- every error is one line: what is wrong, which file or option, what to do.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

[[noreturn]] inline void die_with(int code, const char* format, va_list args) {
  fflush(stdout);
  fprintf(stderr, "error: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  fflush(stderr);
  _Exit(code);            // no destructors: other threads may still be running
}
// Something went wrong while running: exit 1.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void die(const char* format, ...) {
  va_list args;
  va_start(args, format);
  die_with(1, format, args);
}
// The command line makes no sense: exit 2.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void die_usage(const char* format, ...) {
  va_list args;
  va_start(args, format);
  die_with(2, format, args);
}
