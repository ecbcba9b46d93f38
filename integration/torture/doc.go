// SPDX-License-Identifier: Apache-2.0

// Package torture checkpoints a program that uses memory and files in every way
// there is, again and again, in every way there is, and has it verify each byte that
// it owns: the original after each checkpoint, and what comes back from epochs new
// and old.
//
// The program is program/, in C because nothing else leaves the address space to the
// test: torture.h tells what it does. It is compiled with gcc and packed into an
// image when the test runs.
//
//	TORTURE_N=200 TORTURE_SEED=7 go test ./integration/torture
package torture
