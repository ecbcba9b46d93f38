// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestImagesMadeInMemoryComeToTheirDirectoriesAndLeaveNoMount(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("root is missing")
		}
		t.Skip("root is missing")
	}
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	d := &Dump{cfg: Config{ImagesDir: t.TempDir(), WorkDir: t.TempDir(), InMemory: true}}
	if err := d.openDirs(); err != nil {
		t.Fatal(err)
	}
	defer d.closeFiles()
	if !d.memory {
		t.Fatal("there is no file system in memory on this host")
	}
	// As CRIU does it: through the descriptors of another process.
	for i, f := range []*os.File{d.imgs, d.work} {
		dir := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file-", i)), []byte{byte(i), 2, 3}, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	during, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if string(during) != string(before) {
		t.Errorf("the file system in memory is mounted where others see it:\n%s", during)
	}
	if err := d.moveImages(); err != nil {
		t.Fatal(err)
	}
	for i, dir := range []string{d.cfg.ImagesDir, d.cfg.WorkDir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) != 1 || entries[0].Name() != fmt.Sprint("file-", i) {
			t.Fatalf("%s holds %v", dir, entries)
		}
		path := filepath.Join(dir, entries[0].Name())
		if b, err := os.ReadFile(path); err != nil || string(b) != string([]byte{byte(i), 2, 3}) {
			t.Errorf("%s holds %v (%v)", path, b, err)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o640 {
			t.Errorf("%s has mode %v (%v)", path, fi.Mode(), err)
		}
	}
}

func TestTheLogOfAFailedDumpInMemoryIsKept(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("root is missing")
		}
		t.Skip("root is missing")
	}
	d := &Dump{cfg: Config{ImagesDir: t.TempDir(), WorkDir: t.TempDir(), InMemory: true}}
	if err := d.openDirs(); err != nil {
		t.Fatal(err)
	}
	defer d.closeFiles()
	log := fmt.Sprintf("/proc/self/fd/%d/%s", d.work.Fd(), LogFile)
	if err := os.WriteFile(log, []byte("(00.1) Error (criu/files.c:12): no such luck\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := d.explain(context.Canceled)
	if got, want := FirstError(filepath.Join(d.cfg.WorkDir, LogFile)), "Error (criu/files.c:12): no such luck"; got != want {
		t.Errorf("the log says %q, want %q (%v)", got, want, err)
	}
}
