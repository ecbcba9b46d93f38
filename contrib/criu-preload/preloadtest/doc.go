// SPDX-License-Identifier: Apache-2.0

// Package preloadtest holds the tests of libcohort-criu.so, the library that contrib/setup builds from
// cohort-criu.c and loads into CRIU. There is no Go code to import; the C file says what it does.
package preloadtest
