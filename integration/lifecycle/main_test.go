// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/cohort-project/cohort/integration/harness"
)

func TestMain(m *testing.M) {
	// Started as an old CRIU, see fakeCRIU.
	if len(os.Args) == 3 && os.Args[1] == "swrk" {
		if err := oldCRIU(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	code := harness.Main(m)
	if err := second.close(); err != nil {
		fmt.Fprintln(os.Stderr, "ending the second containerd:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// host is a containerd that is not the one of all tests: it stands for another host,
// and its CRIU can be taken away.
type host struct {
	once sync.Once
	in   *harness.Instance
	criu string // what its shims are told CRIU is
	real string
	err  error
}

var second host

// up starts the host at its first use. The set-up's images are all that it has.
func (h *host) up(t *testing.T) *world {
	t.Helper()
	first := setUp(t)
	h.once.Do(func() { h.err = h.start(first) })
	first.must(h.err)
	t.Cleanup(func() { h.in.CheckClean(t) })
	return &world{T: t, in: h.in, ctx: first.ctx}
}

func (h *host) start(w *world) (err error) {
	if h.real, err = exec.LookPath("criu"); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "cohort-lifecycle-")
	if err != nil {
		return err
	}
	h.criu = filepath.Join(dir, "criu")
	if err := h.useCRIU(h.real); err != nil {
		return err
	}
	// The daemons, and with them the shims, inherit it.
	if err := os.Setenv("COHORT_CRIU", h.criu); err != nil {
		return err
	}
	defer os.Unsetenv("COHORT_CRIU")
	h.in, err = harness.Start(w.ctx, "other")
	return err
}

func (h *host) close() error {
	var err error
	if h.in != nil {
		err = h.in.Close()
	}
	if h.criu != "" {
		err = errors.Join(err, os.RemoveAll(filepath.Dir(h.criu)))
	}
	return err
}

// useCRIU makes another program CRIU, none if it is empty. Shims that have looked
// already do not notice.
func (h *host) useCRIU(program string) error {
	if err := os.Remove(h.criu); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if program == "" {
		return nil
	}
	return os.WriteFile(h.criu, []byte("#!/bin/sh\nexec '"+program+"' \"$@\"\n"), 0o755)
}

// oldCRIU answers one request on a socket as `criu swrk` of the version 3.17 does,
// if it is the one for the version.
func oldCRIU(fd string) error {
	n, err := strconv.Atoi(fd)
	if err != nil {
		return err
	}
	b := make([]byte, 4096)
	size, err := unix.Read(n, b)
	if err != nil {
		return err
	}
	var req rpc.CriuReq
	if err := proto.Unmarshal(b[:size], &req); err != nil {
		return err
	}
	resp := &rpc.CriuResp{Type: req.Type, Success: proto.Bool(req.GetType() == rpc.CriuReqType_VERSION)}
	if resp.GetSuccess() {
		resp.Version = &rpc.CriuVersion{MajorNumber: proto.Int32(3), MinorNumber: proto.Int32(17)}
	}
	out, err := proto.Marshal(resp)
	if err != nil {
		return err
	}
	_, err = unix.Write(n, out)
	return err
}
