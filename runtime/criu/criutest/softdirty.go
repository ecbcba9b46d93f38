// SPDX-License-Identifier: Apache-2.0

// Package criutest lets tests take memory by soft-dirty bits, with the real CRIU, on
// kernels that have none.
package criutest

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

//go:embed testdata/softdirty.c
var softDirty []byte

// SoftDirty makes a CRIU that sees the marks of asynchronous write protection, which
// somebody has put on a process, as soft-dirty bits; of a process without them all pages
// are dirty. It returns the program's path, for the variable COHORT_CRIU. missing is
// called with what is wanting on the host.
func SoftDirty(t testing.TB, missing func(what string)) string {
	t.Helper()
	for _, tool := range []string{"gcc", "criu"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing(tool)
		}
	}
	dir := t.TempDir()
	source, library, program := filepath.Join(dir, "softdirty.c"), filepath.Join(dir, "softdirty.so"), filepath.Join(dir, "criu")
	must(t, os.WriteFile(source, softDirty, 0o600))
	out, err := exec.Command("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-nostdlib", "-fno-builtin", "-fno-stack-protector",
		"-fno-tree-loop-distribute-patterns", "-Wl,-z,now", "-o", library, source).CombinedOutput()
	if err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	path, err := exec.LookPath("criu")
	must(t, err)
	path, err = filepath.EvalSymlinks(path)
	must(t, err)
	script, err := os.ReadFile(path)
	must(t, err)
	preload := regexp.MustCompile(`--preload "([^"]+)"`)
	if !preload.Match(script) {
		missing("a criu that contrib/setup has made")
	}
	text := preload.ReplaceAllString(string(script), `--preload "`+library+` $1"`)
	text = strings.Replace(text, "self=$0", "self="+path, 1)
	must(t, os.WriteFile(program, []byte(text), 0o700))
	return program
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
