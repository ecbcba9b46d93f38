// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"

	storage "github.com/cohort-project/cohort/api/storage/v1"
	"github.com/cohort-project/cohort/api/version"
	"github.com/cohort-project/cohort/runtime/urgent"
	"github.com/cohort-project/cohort/snapshotter/capture"
	"github.com/cohort-project/cohort/snapshotter/volume"
)

// Snapshots is what the service needs to know of the snapshotter.
type Snapshots interface {
	// ActiveUpper refuses a directory that is not an active snapshot's upper directory.
	ActiveUpper(ctx context.Context, dir string) error
	// CommittedUpper refuses a directory that is not a committed snapshot's layer.
	CommittedUpper(ctx context.Context, dir string) error
}

// Storage implements the Storage service over the captures of one root.
type Storage struct {
	root      string
	address   string
	captures  *capture.Store
	snapshots Snapshots
	metrics   *Metrics
	hurry     hurry
}

var _ storage.StorageService = (*Storage)(nil)

// NewStorage returns the service. address is the socket of the snapshotter's gRPC
// service, for Info.
func NewStorage(root, address string, captures *capture.Store, snapshots Snapshots, metrics *Metrics) *Storage {
	return &Storage{root: root, address: address, captures: captures, snapshots: snapshots, metrics: metrics}
}

// Open implements storage.StorageService.
func (s *Storage) Open(ctx context.Context, r *storage.OpenRequest) (*storage.OpenResponse, error) {
	if err := s.snapshots.ActiveUpper(ctx, r.GetUpperdir()); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	info, err := s.captures.Open(ctx, r.GetId(), r.GetUpperdir(), lease(r.GetLeaseMs()), r.GetLabels())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &storage.OpenResponse{Dir: info.Dir}, nil
}

// Ready implements storage.StorageService.
func (s *Storage) Ready(ctx context.Context, r *storage.CaptureRequest) (*storage.Empty, error) {
	approached := make(chan func(), 1)
	go func() { approached <- s.hurry.approach(r.GetId()) }()
	err := s.captures.Ready(ctx, r.GetId())
	at, ok := ctx.Deadline()
	if ok {
		// The writers are frozen then, and run until then: not before them.
		select {
		case <-time.After(time.Until(at) - urgent.Poised):
		case <-ctx.Done():
		}
	}
	raise := <-approached
	if ok && time.Since(at) > urgent.Poised {
		s.hurry.end(r.GetId()) // Take may have been and gone
	} else {
		raise()
	}
	return &storage.Empty{}, errgrpc.ToGRPC(err)
}

// Take implements storage.StorageService.
func (s *Storage) Take(ctx context.Context, r *storage.CaptureRequest) (*storage.TakeResponse, error) {
	defer s.hurry.end(r.GetId())
	took, err := s.captures.Take(ctx, r.GetId(), lease(r.GetLeaseMs()))
	s.metrics.took(took, err)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &storage.TakeResponse{TookNs: took.Nanoseconds()}, nil
}

// Seal implements storage.StorageService.
func (s *Storage) Seal(ctx context.Context, r *storage.SealRequest) (*storage.SealResponse, error) {
	for _, u := range r.GetUppers() {
		if err := s.snapshots.CommittedUpper(ctx, u); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	}
	info, err := s.captures.Seal(ctx, r.GetId(), r.GetUppers()...)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &storage.SealResponse{
		FsDir:          info.Path(capture.FS),
		CheckpointDir:  info.Path(capture.Checkpoint),
		StorageBytes:   info.StorageBytes,
		UnchangedBytes: info.UnchangedBytes,
	}, nil
}

// Discard implements storage.StorageService.
func (s *Storage) Discard(_ context.Context, r *storage.CaptureRequest) (*storage.Empty, error) {
	defer s.hurry.end(r.GetId())
	return &storage.Empty{}, errgrpc.ToGRPC(s.captures.Discard(r.GetId()))
}

// Renew implements storage.StorageService.
func (s *Storage) Renew(_ context.Context, r *storage.CaptureRequest) (*storage.Empty, error) {
	return &storage.Empty{}, errgrpc.ToGRPC(s.captures.Renew(r.GetId(), lease(r.GetLeaseMs())))
}

// List implements storage.StorageService.
func (s *Storage) List(context.Context, *storage.Empty) (*storage.ListResponse, error) {
	var out storage.ListResponse
	for _, i := range s.captures.List() {
		out.Captures = append(out.Captures, &storage.Capture{Id: i.ID, State: string(i.State), Labels: i.Labels, Dir: i.Dir})
	}
	return &out, nil
}

// Info implements storage.StorageService.
func (s *Storage) Info(context.Context, *storage.Empty) (*storage.InfoResponse, error) {
	free, _, err := volume.Free(s.root)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &storage.InfoResponse{
		Backend:            s.captures.Backend().Name(),
		Root:               s.root,
		FreeBytes:          free,
		Version:            version.Version,
		SnapshotterAddress: s.address,
	}, nil
}

// lease translates milliseconds; 0 is for the store to decide.
func lease(ms uint32) time.Duration { return time.Duration(ms) * time.Millisecond }
