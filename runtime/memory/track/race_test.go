// SPDX-License-Identifier: Apache-2.0

package track

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStopSignalsDuringAttachAreObeyed(t *testing.T) {
	c := startChecker(t, "read")
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGCONT} {
				_ = unix.Kill(c.pid(), sig)
				select {
				case <-end:
					return
				case <-time.After(time.Duration(rand.IntN(700)) * time.Microsecond):
				}
			}
		}
	})
	for range 200 {
		attachTo(t, c.pid()).Close()
	}
	close(end)
	wg.Wait()
	_ = unix.Kill(c.pid(), unix.SIGSTOP)
	waitState(t, c.pid(), 'T')
	_ = unix.Kill(c.pid(), unix.SIGCONT)
	c.finish()
}

func TestAttachDuringExecAndExitFailsCleanly(t *testing.T) {
	needTracking(t)
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("exec sh "+script+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	loop := exec.Command("sh", script)
	if err := loop.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = loop.Process.Kill()
		_ = loop.Wait()
	}()
	outcomes := map[string]int{}
	try := func(pid int) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		tr, err := Attach(ctx, pid)
		if err == nil {
			err = tr.Take(ctx, func(Range) error { return nil })
			tr.Close()
		}
		switch {
		case err == nil:
			outcomes["tracked"]++
		case errors.Is(err, ErrExec):
			outcomes["exec"]++
		case errors.Is(err, ErrGone):
			outcomes["gone"]++
		default:
			t.Errorf("%v", err)
		}
	}
	for range 50 {
		try(loop.Process.Pid)
	}
	if st, err := readStatus(procPath(loop.Process.Pid, "status")); err != nil || st.state == 'Z' {
		t.Errorf("the program that executes itself ended: %+v %v", st, err)
	}
	t.Logf("a program that executes itself: %v", outcomes)
	clear(outcomes)
	for range 50 {
		short := exec.Command("true")
		if err := short.Start(); err != nil {
			t.Fatal(err)
		}
		try(short.Process.Pid)
		if err := short.Wait(); err != nil {
			t.Errorf("true: %v", err)
		}
	}
	t.Logf("programs that end: %v", outcomes)
}

// goLoadEnv makes the test binary a Go program with goroutines, a busy collector,
// preemption by signals, and a checksum of all it does.
const goLoadEnv = "TRACK_TEST_GO_LOAD"

func init() {
	if os.Getenv(goLoadEnv) == "" {
		return
	}
	end := make(chan struct{})
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		close(end)
	}()
	var wg sync.WaitGroup
	fmt.Println("ready")
	for g := range 4 {
		wg.Go(func() {
			for round := 0; ; round++ {
				select {
				case <-end:
					return
				default:
				}
				lists := map[int][]byte{}
				for i := range 200 {
					lists[i] = bytes.Repeat([]byte{byte(i + g + round)}, 1000+i)
				}
				runtime.Gosched()
				for i, l := range lists {
					want := sha256.Sum256(bytes.Repeat([]byte{byte(i + g + round)}, 1000+i))
					if sha256.Sum256(l) != want {
						fmt.Println("bad checksum")
						os.Exit(1)
					}
				}
			}
		})
	}
	wg.Wait()
	fmt.Println("ok done")
	os.Exit(0)
}

func TestGoProgramIsUnharmed(t *testing.T) {
	needTracking(t)
	c := &checker{t: t, cmd: exec.Command("/proc/self/exe")}
	c.cmd.Env = append(os.Environ(), goLoadEnv+"=1")
	c.start(t, "go")
	for range 100 {
		tr := attachTo(t, c.pid())
		for range 3 {
			if err := tr.Take(context.Background(), func(Range) error { return nil }); err != nil {
				t.Fatal(err)
			}
			refresh(t, tr)
		}
		tr.Close()
	}
	c.finish()
}

func TestDirectTransfersAreNamed(t *testing.T) {
	s := startSubject(t, nil)
	blind := func() string {
		t.Helper()
		list, err := Blind(s.pid)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(list, "; ")
	}
	if got := blind(); got != "" {
		t.Errorf("a process without any: %s", got)
	}
	s.do("aio")
	if got := blind(); !strings.Contains(got, "asynchronous") {
		t.Errorf("with an AIO context: %q", got)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, pageSize), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.try("direct %s", file); err != nil {
		missing(t, "a file system with O_DIRECT: "+err.Error())
	}
	if got := blind(); !strings.Contains(got, file) {
		t.Errorf("with %s open with O_DIRECT: %q", file, got)
	}
	if _, err := Blind(1 << 30); !errors.Is(err, ErrGone) {
		t.Errorf("of no process: %v", err)
	}
}
