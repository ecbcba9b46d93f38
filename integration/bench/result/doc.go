// SPDX-License-Identifier: Apache-2.0

// Package result is what a run of the benchmark found: rows of numbers, the
// machine they were measured on, and what they mean (medians, ratios, whether a
// target was met). It measures nothing and is pure but for Read and Write, so a
// file of results can be turned into tables and pictures anywhere, any time.
package result
