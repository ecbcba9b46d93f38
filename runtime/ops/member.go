// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/group"
)

// member is a container as the coordinator sees it, over its shim's ttrpc
// connection. Results that are not the coordinator's business stay here.
type member struct {
	c       *Container
	image   imageFacts
	capture *memberAPI.CaptureResponse
	sealed  *memberAPI.SealResponse

	// parent is what an increment may be taken against, nil if there is nothing;
	// fullWhy says why not where that is not plain.
	parent *parentOf
	// earlier is its part of the epoch that was looked at.
	earlier      *oci.Member
	fullWhy      string
	keepTracking bool
	yieldCPU     bool
	engine       string
	pace         float64
}

// increment says whether the sealed checkpoint is one: its shim decides, for memory and
// files together.
func (m *member) increment() bool { return m.sealed.GetMemory().GetIncrement() != "" }

// imageFacts are what only containerd knows of a container.
type imageFacts struct {
	ref, digest, chainID string
	target               ocispec.Descriptor
}

var _ group.Member = (*member)(nil)

func (m *member) ID() string { return m.c.Member }

func (m *member) epoch(id string) *memberAPI.EpochRequest {
	return &memberAPI.EpochRequest{Id: m.c.ID(), Epoch: id}
}

// native maps an answer back to the classes that package group knows.
func native(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("its shim has ended: %w", err)
	}
	err = errgrpc.ToNative(err)
	if errdefs.IsFailedPrecondition(err) || errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		// The member's own words begin with the class already.
		return fmt.Errorf("%w: %s", group.ErrRefused, strings.TrimPrefix(err.Error(), group.ErrRefused.Error()+": "))
	}
	return err
}

func (m *member) Prepare(ctx context.Context, e group.Epoch) error {
	req := &memberAPI.PrepareRequest{
		Id: m.c.ID(), Epoch: e.ID, LeaseMs: uint32(e.Lease.Milliseconds()), Group: e.Group, Number: e.Number,
		Stop: e.Stop, Member: m.c.Member,
		ImageRef: m.image.ref, ImageDigest: m.image.digest, ChainId: m.image.chainID,
		CreatedUnixNs: m.c.Info.CreatedAt.UnixNano(), KeepTracking: m.keepTracking, Engine: m.engine,
		YieldCpu: m.yieldCPU, Pace: m.pace,
	}
	if m.parent != nil {
		req.Parent = m.parent.api
	}
	_, err := m.c.api.Prepare(ctx, req)
	return native(err)
}

func (m *member) Freeze(ctx context.Context, epoch string, at int64) (int64, int64, error) {
	resp, err := m.c.api.Freeze(ctx, &memberAPI.FreezeRequest{Id: m.c.ID(), Epoch: epoch, AtNs: at})
	if err != nil {
		return 0, 0, native(err)
	}
	return resp.AskedNs, resp.FrozenNs, nil
}

func (m *member) Lock(ctx context.Context, epoch string) error {
	_, err := m.c.api.Lock(ctx, m.epoch(epoch))
	return native(err)
}

func (m *member) Capture(ctx context.Context, epoch string) error {
	resp, err := m.c.api.Capture(ctx, m.epoch(epoch))
	if err == nil {
		m.capture = resp
	}
	return native(err)
}

func (m *member) Unlock(ctx context.Context, epoch string) error {
	_, err := m.c.api.Unlock(ctx, m.epoch(epoch))
	return native(err)
}

func (m *member) Resume(ctx context.Context, epoch string, stop bool) (int64, error) {
	resp, err := m.c.api.Resume(ctx, &memberAPI.ResumeRequest{Id: m.c.ID(), Epoch: epoch, Stop: stop})
	if err != nil {
		return 0, native(err)
	}
	return resp.ResumedNs, nil
}

func (m *member) Seal(ctx context.Context, epoch string) error {
	resp, err := m.c.api.Seal(ctx, m.epoch(epoch))
	if err == nil {
		m.sealed = resp
	}
	return native(err)
}

func (m *member) Finish(ctx context.Context, epoch string) error {
	_, err := m.c.api.Finish(ctx, m.epoch(epoch))
	return native(err)
}

func (m *member) Abort(ctx context.Context, epoch string) error {
	_, err := m.c.api.Abort(ctx, m.epoch(epoch))
	return native(err)
}

func (m *member) Renew(ctx context.Context, epoch string) error {
	_, err := m.c.api.Renew(ctx, m.epoch(epoch))
	return native(err)
}
