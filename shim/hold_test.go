// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// act is what CRIU's action script does, without changing this process.
func act(t *testing.T, dir string) string {
	t.Helper()
	c, err := net.Dial("unix", filepath.Join(dir, holdSocket))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 16)
	n, _ := c.Read(b)
	return strings.TrimSpace(string(b[:n]))
}

func newTestHold(t *testing.T) (*hold, string) {
	t.Helper()
	dir := t.TempDir()
	h, err := newHold(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	return h, dir
}

func TestHeldRestoreGoesOnWhenReleased(t *testing.T) {
	h, dir := newTestHold(t)
	got := make(chan string, 1)
	go func() { got <- act(t, dir) }()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := h.await(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case v := <-got:
		t.Fatalf("went on with %q before the release", v)
	case <-time.After(50 * time.Millisecond):
	}
	h.decide(true)
	if v := <-got; v != verdictGo {
		t.Fatalf("verdict %q", v)
	}
}

func TestHeldRestoreFailsWhenAborted(t *testing.T) {
	h, dir := newTestHold(t)
	h.decide(false)
	h.decide(true) // too late
	if v := act(t, dir); v == verdictGo {
		t.Fatal("an aborted restore went on")
	}
}

func TestHeldRestoreFailsWhenItsCoordinatorFallsSilent(t *testing.T) {
	h, dir := newTestHold(t)
	h.renew(30 * time.Millisecond)
	if v := act(t, dir); v == verdictGo {
		t.Fatal("went on although nobody released it")
	}
}

func TestAwaitEndsWhenTheRestoreFailsBefore(t *testing.T) {
	h, _ := newTestHold(t)
	time.AfterFunc(10*time.Millisecond, h.close)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := h.await(ctx); err == nil || ctx.Err() != nil {
		t.Fatalf("await: %v, context: %v", err, ctx.Err())
	}
}
