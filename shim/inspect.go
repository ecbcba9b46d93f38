// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/runtime/criu"
	"github.com/cohort-project/cohort/runtime/freezer"
)

// criuVersion asks CRIU once in the shim's life.
var criuVersion = sync.OnceValues(func() (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return criu.Version(ctx)
})

// Inspect implements the Member service.
func (s memberService) Inspect(ctx context.Context, r *memberAPI.InspectRequest) (*memberAPI.InspectResponse, error) {
	c, err := s.get(r.Id)
	if err != nil {
		return nil, err
	}
	st, err := s.State(ctx, &taskAPI.StateRequest{ID: r.Id})
	if err != nil {
		return nil, err
	}
	resp := &memberAPI.InspectResponse{
		Id: c.id, Bundle: c.bundle, InitPid: int32(st.Pid), ShimPid: int32(os.Getpid()),
		Status:         strings.ToLower(task.Status_name[int32(st.Status)]),
		StorageAddress: c.storage.socket, Upperdir: c.storage.upper,
		Rootfs: c.bundle + "/rootfs",
	}
	resp.Epoch = c.participant().Ledger().Epoch.ID
	resp.TrackedEpoch = c.trackedEpoch()
	// Both start a process, once in the shim's life.
	probed := make(chan struct{})
	go func() {
		defer close(probed)
		memoryFacts()
	}()
	if v, err := criuVersion(); err != nil {
		resp.CriuError = err.Error()
	} else {
		resp.CriuVersion = uint32(v)
	}
	<-probed
	if choice, err := chooseEngine(r.Engine); err != nil {
		resp.MemoryEngineWhy = err.Error()
	} else {
		resp.MemoryEngine, resp.MemoryEngineWhy = string(choice.Engine), choice.Why
	}
	if st.Pid == 0 || st.Status == task.Status_STOPPED {
		return resp, nil
	}
	pid := int(st.Pid)
	resp.Netns, resp.HostNetwork = netnsOf(pid)
	fz, err := freezer.Open(pid)
	if err != nil {
		// The container may have ended since; its status says so on the next look.
		return resp, nil
	}
	defer fz.Close()
	resp.Freezer = fz.Path()
	pids, err := fz.Tasks()
	if err != nil {
		return resp, nil
	}
	inTree := descendants(pid, pids)
	for _, p := range pids {
		proc, err := readProcess(p)
		if err != nil {
			continue // ended since
		}
		if !inTree[p] {
			resp.Foreign = append(resp.Foreign, proc)
			continue
		}
		resp.Processes = append(resp.Processes, proc)
		resp.MemoryBytes += anonymousBytes(p)
	}
	return resp, nil
}

// netnsOf returns the inode of the network namespace of pid, and whether it is
// the shim's own, that is the host's.
func netnsOf(pid int) (uint64, bool) {
	var st, own unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) != nil || unix.Stat("/proc/self/ns/net", &own) != nil {
		return 0, false
	}
	return st.Ino, st.Ino == own.Ino
}

func readProcess(pid int) (*memberAPI.Process, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	p := &memberAPI.Process{Pid: int32(pid)}
	for line := range bytes.Lines(b) {
		key, val, _ := strings.Cut(strings.TrimSpace(string(line)), ":")
		fields := strings.Fields(val)
		if len(fields) == 0 {
			continue
		}
		switch key {
		case "Name":
			p.Comm = strings.TrimSpace(val)
		case "PPid":
			p.Ppid = int32(atoi(fields[0]))
		case "NSpid":
			p.NsPid = int32(atoi(fields[len(fields)-1]))
		case "Threads":
			p.Threads = uint32(atoi(fields[0]))
		case "VmRSS":
			p.RssBytes = uint64(atoi(fields[0])) << 10
		}
	}
	return p, nil
}

// anonymousBytes is the memory of a process that has no file behind it: what a
// dump must write. RssAnon and RssShmem of proc(5), status; shared memory is
// counted for each process that maps it, so the sum is an upper bound.
func anonymousBytes(pid int) (n uint64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(b) {
		key, val, _ := strings.Cut(string(line), ":")
		if key == "RssAnon" || key == "RssShmem" || key == "VmSwap" {
			if f := strings.Fields(val); len(f) > 0 {
				n += uint64(atoi(f[0])) << 10
			}
		}
	}
	return n
}

// descendants tells which of pids are root or descend from it.
func descendants(root int, pids []int) map[int]bool {
	parent := map[int]int{}
	for _, p := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		if err != nil {
			continue
		}
		s := string(b)
		if f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:]); len(f) > 1 {
			parent[p] = atoi(f[1])
		}
	}
	in := map[int]bool{root: true}
	for _, p := range pids {
		var chain []int
		for q := p; q != 0 && !in[q]; q = parent[q] {
			if _, ok := parent[q]; !ok || len(chain) > len(pids) {
				chain = nil
				break
			}
			chain = append(chain, q)
			if in[parent[q]] {
				for _, x := range chain {
					in[x] = true
				}
				break
			}
		}
	}
	return in
}

func atoi(s string) int { n, _ := strconv.Atoi(s); return n }
