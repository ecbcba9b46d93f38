// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFirstErrorLineOfTheLogIsInTheError(t *testing.T) {
	log := filepath.Join(t.TempDir(), "dump.log")
	text := "(00.000050) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n" +
		"(00.000100) Warn  (criu/kerndat.c:1): no such thing\n" +
		"(00.010000) Error (criu/sk-unix.c:815): sk unix: Can't dump half of stream unix connection.\n" +
		"(00.010001) Error (criu/cr-dump.c:2128): Dumping FAILED.\n"
	if err := os.WriteFile(log, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("CRIU failed: type NOTIFY errno 0")
	err := Explain(cause, log)
	if !errors.Is(err, cause) || !strings.Contains(err.Error(), "Can't dump half of stream") || strings.Contains(err.Error(), "FAILED") {
		t.Fatal(err)
	}
	if err := Explain(cause, log+"x"); !errors.Is(err, cause) || !strings.Contains(err.Error(), "no log") {
		t.Fatalf("without a log: %v", err)
	}
}

func TestLogOfAFailureWithoutAnErrorIsQuotedAtItsEnd(t *testing.T) {
	log := filepath.Join(t.TempDir(), "dump.log")
	if err := os.WriteFile(log, []byte(strings.Repeat("(00.000001) early\n", 100)+"(00.1) one\n(00.2) two\n(00.3) three\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := Explain(errors.New("CRIU failed"), log)
	if !strings.Contains(err.Error(), `"(00.1) one" "(00.2) two" "(00.3) three"`) || strings.Contains(err.Error(), "early") {
		t.Fatal(err)
	}
}

func TestRestoreConfigAsksForWhatRuncsCallersDoNot(t *testing.T) {
	dir, images := t.TempDir(), t.TempDir()
	c := RestoreConfig{Dir: dir, Images: images, Hold: "/opt/it's/shim", External: map[string]string{"/dev/shm": "/x/0"}}
	conf, err := c.Write()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"tcp-established", "file-locks", "ext-unix-sk", "manage-cgroups=ignore", "action-script " + dir, "external mnt[/dev/shm]:/x/0\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
	// Images that hold cgroups are restored with them.
	if err := os.WriteFile(filepath.Join(images, "cgroup.img"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Hold = ""
	if _, err := c.Write(); err != nil {
		t.Fatal(err)
	}
	if b, _ = os.ReadFile(conf); strings.Contains(string(b), "ignore") || strings.Contains(string(b), "action-script") {
		t.Errorf("unexpected\n%s", b)
	}
}
