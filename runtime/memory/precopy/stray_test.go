// SPDX-License-Identifier: Apache-2.0

package precopy

import (
	"bytes"
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
)

const joinerEnv = "PRECOPY_TEST_JOINER"

// This program, run again, is a process with two mappings of 32 pages, the first of which is continued by an
// untouched one on command: the kernel then takes the registration from both. On the same command it opens a
// file for direct transfers, so that nothing of it is believed any more.
func init() {
	file := os.Getenv(joinerEnv)
	if file == "" {
		return
	}
	const rw = unix.PROT_READ | unix.PROT_WRITE
	mapped := func(at uintptr, n uint64, prot, flags int) uintptr {
		p, _, errno := unix.Syscall6(unix.SYS_MMAP, at, uintptr(n*pageSize), uintptr(prot), uintptr(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|flags), ^uintptr(0), 0)
		if errno != 0 {
			os.Exit(1)
		}
		return p
	}
	size := uintptr(pageSize)
	hole, other := mapped(0, 256, unix.PROT_NONE, 0), mapped(0, 64, unix.PROT_NONE, 0)
	first, second := mapped(hole+16*size, 32, rw, unix.MAP_FIXED), mapped(hole+128*size, 32, rw, unix.MAP_FIXED)
	empty := mapped(other+16*size, 8, rw, unix.MAP_FIXED)
	memory, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
	for _, at := range []uintptr{first, second} {
		if err == nil {
			_, err = memory.WriteAt(bytes.Repeat([]byte{1}, int(32*pageSize)), int64(at))
		}
	}
	if err != nil {
		os.Exit(1)
	}
	_, _ = os.Stdout.WriteString("ready\n")
	var command [1]byte
	_, _ = os.Stdin.Read(command[:])
	if _, _, errno := unix.Syscall6(unix.SYS_MREMAP, empty, 8*size, 8*size, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, first+32*size, 0); errno != 0 {
		os.Exit(2)
	}
	if _, err := unix.Open(file, unix.O_RDONLY|unix.O_DIRECT, 0); err != nil {
		os.Exit(3)
	}
	_, _ = os.Stdout.WriteString("ready\n")
	select {}
}

// What the kernel does not tell is copied in the barrier, and again where nothing is believed.
func TestPagesOfAMappingThatLostItsRegistrationAreCopied(t *testing.T) {
	needTracking(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), joinerEnv+"="+file)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	ready := started(t, c)
	ready()
	s, err := Start(t.Context(), t.TempDir(), func() ([]Process, error) { return []Process{{c.Process.Pid, 1}}, nil }, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if _, err := in.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	ready()
	if err := c.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitStopped(t, c.Process.Pid)
	if err := s.Scan(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := s.members[0]
	if !slices.Equal(s.Held(), []int{m.Pid}) {
		t.Errorf("held are %v", s.Held())
	}
	if !slices.IsSortedFunc(m.clean, func(a, b pages.Range) int { return cmp.Compare(a.Start, b.Start) }) {
		t.Errorf("not in order: %v", m.clean)
	}
	if err := s.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !m.again {
		t.Error("the file that was opened for direct transfers was not noticed")
	}
	if missing, err := m.store.Missing(m.clean); err != nil || len(missing) > 0 {
		t.Errorf("missing are %v, %v", missing, err)
	}
}
