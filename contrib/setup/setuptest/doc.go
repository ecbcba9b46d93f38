// SPDX-License-Identifier: Apache-2.0

// Package setuptest holds the tests of contrib/setup/up.sh and down.sh: what they print, and that nothing
// of an instance outlives it. They need root, `make build` and `make setup`.
package setuptest
