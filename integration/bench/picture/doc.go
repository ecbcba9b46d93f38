// SPDX-License-Identifier: Apache-2.0

// Package picture draws results of the benchmark as SVG, for pages that are
// looked at in light and in dark mode: each picture brings its own white ground and
// asks for no font of its own.
package picture
