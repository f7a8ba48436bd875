// Turns an instruction set on for a region of one file. BuildExtension compiles every source with the same flags, so
// the ISA cannot come from the command line; system headers are included here, before any region, so that none of
// their inline functions is compiled for a wider machine than the user's.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define TS_X86 1
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own _mm512_undefined_ps
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#else
#define TS_X86 0
#endif

#define TS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TS_TARGET_BEGIN(features) \
  TS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TS_TARGET_END TS_PRAGMA(clang attribute pop)
#else
#define TS_TARGET_BEGIN(features) TS_PRAGMA(GCC push_options) TS_PRAGMA(GCC target(features))
#define TS_TARGET_END TS_PRAGMA(GCC pop_options)
#endif
